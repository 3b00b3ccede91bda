"""Parts of the server by themselves: text in pieces, sampling, keys, logs."""

from __future__ import annotations

import io
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from loraxs_ext.serve.server.auth import Keys, check_binding, read_keys
from loraxs_ext.serve.server.limits import Limits
from loraxs_ext.serve.server.sampling import Sampling, perturbed
from loraxs_ext.serve.server.text import TextStream, Tokens


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """A token for every byte."""
    tokens = Tokenizer(models.BPE({f"<0x{i:02X}>": i for i in range(256)}, [], byte_fallback=True))
    tokens.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


TEXT = "Grüße, 世界! 👩‍👩‍👧 end"


def pieces(tokenizer, data: bytes, stop=()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    found = []
    for token in data:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.flush()]


def test_characters_come_whole(bytewise):
    found = pieces(bytewise, TEXT.encode())
    assert "".join(found) == TEXT and "\ufffd" not in "".join(found)
    # At the end, half a character is shown as what it is.
    assert "".join(pieces(bytewise, "aü".encode()[:-1])) == "a\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["世界"], "Grüße, "),
        (["界!", "世界! 👩"], "Grüße, 世"),
        (["never"], TEXT),
        (["end."], TEXT),
        (["nd", "e"], "Grüß"),
        ([TEXT], ""),
        (["d"], TEXT[:-1]),
    ],
    ids=str,
)
def test_stop_sequences(bytewise, stop, expected):
    """What might be the beginning of one is held back until it is certain."""
    found = pieces(bytewise, TEXT.encode(), stop)
    assert "".join(found) == expected
    assert not any(text in "".join(found[:i]) for text in stop for i in range(len(found)))


def test_text_that_is_none(bytewise):
    tokens = Tokens(bytewise, [])
    with pytest.raises(ValueError, match="messages: this model has no chat template"):
        tokens.of_messages([{"role": "user", "content": "a"}])
    refusing = PreTrainedTokenizerFast(tokenizer_object=bytewise.backend_tokenizer)
    refusing.chat_template = "{{ raise_exception('only one message') }}"
    with pytest.raises(ValueError, match="the chat template of this model refuses them: only one message"):
        Tokens(refusing, []).of_messages([{"role": "user", "content": "a"}])


def test_samples_have_the_distribution_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    sampling = [Sampling(temperature=0.7, seed=seed) for seed in range(4000)]
    counts = torch.bincount(torch.stack([perturbed(logits, one, 3).argmax() for one in sampling]), minlength=5)
    expected = (logits / 0.7).softmax(0) * len(sampling)
    # χ² with four degrees of freedom is above 18.5 once in a thousand draws; these draws are always the same.
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5


@pytest.mark.parametrize(
    ("options", "left"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.7}, {0, 1}), ({"top_p": 0.5}, {0}), ({"top_k": 9}, {0, 1, 2, 3, 4})],
    ids=str,
)
def test_what_is_left_to_sample_from(options, left):
    """softmax: 0.64, 0.23, 0.09, 0.03, 0.01."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    found = {int(perturbed(logits, Sampling(1.0, seed=seed, **options), 0).argmax()) for seed in range(600)}
    assert found == left


def test_positions_and_seeds_draw_anew():
    logits = torch.zeros(1000)
    draws = {int(perturbed(logits, Sampling(1.0, seed=s), p).argmax()) for s in range(5) for p in range(5)}
    assert len(draws) > 20


def test_keys(tmp_path):
    keys = Keys(["a" * 16, "b" * 16])
    assert keys.accept(b"Bearer " + b"a" * 16) and keys.accept(b"bearer  " + b"b" * 16)
    for wrong in (None, b"", b"Bearer", b"Bearer ", b"a" * 16, b"Basic " + b"a" * 16, b"Bearer " + b"a" * 17, b"\xff"):
        assert not keys.accept(wrong)
    assert not Keys().accept(b"Bearer ") and not Keys()
    assert "aaaa" not in repr(keys)
    for bad in ("short", "a" * 15, "ä" * 16, "a" * 16 + " b"):
        with pytest.raises(ValueError, match="key 1: expected at least 16") as caught:
            Keys([bad])
        assert bad not in str(caught.value)
    assert read_keys(None, "KEY", {"KEY": "c" * 16}).accept(b"Bearer " + b"c" * 16)
    assert not read_keys(None, "KEY", {})
    with pytest.raises(ValueError, match="KEY, key 1: expected at least 16"):
        read_keys(None, "KEY", {"KEY": "short"})
    (tmp_path / "large").write_text("a" * (1 << 20) + "\n")
    with pytest.raises(ValueError, match="expected keys, one a line"):
        read_keys(tmp_path / "large", "KEY", {})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_this_machine_needs_no_key(host):
    check_binding(host, Keys())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_others_need_one(host):
    with pytest.raises(ValueError, match="--host: expected a loopback address"):
        check_binding(host, Keys())
    check_binding(host, Keys(["a" * 16]))


@pytest.mark.parametrize("limit", ["body", "queue", "slot_seconds", "context"])
def test_limits_are_positive(limit):
    with pytest.raises(ValueError, match=f"{limit}: expected a positive number, got -1"):
        Limits(**{limit: -1})


def test_a_log_of_an_exception_does_not_quote_it():
    from loraxs_ext.serve.server.logs import JsonFormatter

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    record = logging.getLogger("test").makeRecord("test", logging.ERROR, "f", 1, "it failed", (), None)
    try:
        raise ValueError("what a client wrote")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    handler.emit(record)
    line = json.loads(stream.getvalue())
    assert line["event"] == "it failed" and line["exception"] == "ValueError" and "client" not in stream.getvalue()
    assert line["where"][0].endswith("test_a_log_of_an_exception_does_not_quote_it")
