"""`loraxs merge | export | import`: what they print, what they leave behind, how they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from loraxs_ext.checkpoint.importing import detect

from .checkpoint.folders import Folders, save
from .command_line import run, told
from .peft.models import CASES, layers_of


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """A Llama in several shards and an adapter of it."""
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return save(CASES["llama"], tmp_path)


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a failing command says: one line, and nothing is left where it was to write."""
    before = sorted(path for path in arguments[3].parent.iterdir())  # type: ignore[attr-defined]
    capsys.readouterr()
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert sorted(path for path in arguments[3].parent.iterdir() if path.name != "cache") == [  # type: ignore[attr-defined]
        path for path in before if path.name != "cache"
    ]
    return next(line for line in printed.err.splitlines() if line.startswith(f"loraxs {arguments[0]}: "))


def test_merge(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("merge", folders.base, folders.adapter, out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(" MB, 6 modules merged") and printed[1].startswith("rounding took away at most 0.00%")
    wanted = folders.logits(folders.adapted().merge_and_unload())
    assert torch.equal(folders.logits(folders.load(out)), wanted)
    assert "out exists" in failure(capsys, "merge", folders.base, folders.adapter, out)
    facts = told(capsys, "merge", folders.base, folders.adapter, out, "--overwrite", "--dtype", "bf16")
    assert facts["output"] == str(out) and len(facts["losses"]) == 6 and facts["replaced"] == []
    assert folders.load(out).dtype == torch.bfloat16


def test_merge_of_the_wrong_base(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["llama"].base(seed=1).save_pretrained(tmp_path / "other")
    message = failure(capsys, "merge", tmp_path / "other", folders.adapter, tmp_path / "out")
    assert "trained on another base model" in message and "accepted up to 0.1" in message
    assert "another base model" in failure(capsys, "export", tmp_path / "other", folders.adapter, tmp_path / "out")


def test_export(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lora"
    facts = told(capsys, "export", folders.base, folders.adapter, out, "--to", "lora", "--dtype", "bf16")
    assert facts["format"] == "lora" and facts["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    loaded = PeftModel.from_pretrained(folders.load(), out).eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    wanted = folders.logits(folders.adapted())
    torch.testing.assert_close(folders.logits(loaded), wanted, rtol=0.05, atol=0.05)
    assert "lora exists" in failure(capsys, "export", folders.base, folders.adapter, out)


def test_import_of_a_lora(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("export", folders.base, folders.adapter, tmp_path / "lora")
    assert detect(tmp_path / "lora") == "lora"
    out = tmp_path / "xs"
    facts = told(capsys, "import", folders.base, tmp_path / "lora", out, "--rank", 4)
    assert facts["kind"] == "lora" and facts["residual"] < 1e-3 and len(facts["modules"]) == 6
    loaded = folders.adapted(out)
    assert len(layers_of(loaded)) == 6
    torch.testing.assert_close(folders.logits(loaded), folders.logits(folders.adapted()), rtol=1e-3, atol=1e-3)
    message = failure(capsys, "import", folders.base, tmp_path / "lora", tmp_path / "small", "--rank", 2)
    assert "threshold: expected a residual of at most 0.1, got a LoRA" in message and "at rank 2" in message
    assert run("import", folders.base, tmp_path / "lora", tmp_path / "small", "--rank", 2, "--threshold", 1) == 0


def _as(folder: Path, path: Path, key: str | None = None, **fields: Any) -> Path:
    """A copy of an adapter folder under another kind."""
    path.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, **({key: torch.zeros(4, 4)} if key else {})}, path / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return path


def test_import_of_a_tinylora(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TinyLoraConfig(r=3, u=5, target_modules=["q_proj", "down_proj"], init_weights="uniform", init_v_bound=1.0)
    theirs = get_peft_model(folders.load(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert detect(tmp_path / "theirs") == "tinylora"
    assert told(capsys, "import", folders.base, tmp_path / "theirs", tmp_path / "xs")["kind"] == "tinylora"
    wanted = folders.logits(theirs)
    torch.testing.assert_close(folders.logits(folders.adapted(tmp_path / "xs")), wanted, rtol=1e-5, atol=1e-5)
    # What was imported is merged and exported like any other adapter.
    run("merge", folders.base, tmp_path / "xs", tmp_path / "merged")
    torch.testing.assert_close(folders.logits(folders.load(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-4)
    run("export", folders.base, tmp_path / "xs", tmp_path / "lora")
    torch.testing.assert_close(folders.logits(folders.adapted(tmp_path / "lora")), wanted, rtol=1e-4, atol=1e-4)
    message = failure(capsys, "import", folders.base, tmp_path / "theirs", tmp_path / "none", "--rank", 4)
    assert "--rank: expected for a LoRA only, got one for an adapter of kind tinylora" in message


def test_import_of_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn makes the bases of the reference")
    from .checkpoint.reference_format import forward, inputs, roberta, train, write

    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "cache"))
    roberta().save_pretrained(tmp_path / "base")
    trained = train(roberta())
    theirs = write(tmp_path / "theirs", trained, spelling="peft 0.17")
    assert detect(theirs) == "reference"
    assert told(capsys, "import", tmp_path / "base", theirs, tmp_path / "xs")["kind"] == "reference"
    loaded = PeftModel.from_pretrained(roberta(), tmp_path / "xs").eval()
    with torch.no_grad():
        found, expected = loaded(**inputs()).logits, forward(roberta(), trained)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_import_of_what_is_nothing_known(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "import", folders.base, folders.adapter, tmp_path / "out")
    assert "must hold one of reference, tinylora, lora, got peft_type 'LORAXS'" in message


@pytest.mark.parametrize("command", ["merge", "export"])
def test_hostile_adapters(command: str, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes and names that a file claims reach neither memory nor the file system."""
    core = "base_model.model.model.layers.0.self_attn.q_proj.loraxs_R"
    bad = {
        "rank": (_as(folders.adapter, tmp_path / "rank", r=10**9), "size mismatch"),
        "type": (_as(folders.adapter, tmp_path / "type", r="x"), "r: expected an int, got 'x'"),
        "pattern": (_as(folders.adapter, tmp_path / "pattern", rank_pattern=[1]), "cannot be understood"),
        "lora": (_as(folders.adapter, tmp_path / "lora", peft_type="LORA"), "must hold a LoRA-XS adapter, got one of"),
        "name": (_as(folders.adapter, tmp_path / "name", "base_model.model.../../x"), "no place for"),
        "shape": (_as(folders.adapter, tmp_path / "shape", f"{core}.x"), "no place for"),
        "target": (_as(folders.adapter, tmp_path / "target", target_modules=["q_proj"]), "no place for"),
        "pickle": (_as(folders.adapter, tmp_path / "pickle"), "pickled adapters are not read"),
        "header": (_as(folders.adapter, tmp_path / "header"), "eader"),
        "nothing": (tmp_path / "nothing", "without adapter_config.json"),
    }
    weights = tmp_path / "pickle" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    huge = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    (tmp_path / "header" / "adapter_model.safetensors").write_bytes(len(huge).to_bytes(8, "little") + huge)
    for folder, message in bad.values():
        said = failure(capsys, command, folders.base, folder, tmp_path / "out")
        assert message in said, (folder.name, said)


def test_hostile_bases(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = folders.base / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name in ("..", "../secret.safetensors", "/etc/passwd", ""):
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "x": name}}))
        message = failure(capsys, "merge", folders.base, folders.adapter, tmp_path / "out")
        assert "names files outside of its folder" in message
    for content in ("[]", "3", '{"weight_map": {"x": 3}}'):
        index.write_text(content)
        message = failure(capsys, "merge", folders.base, folders.adapter, tmp_path / "out")
        assert "must map names of" in message or "expected a JSON object" in message
    (folders.base / "config.json").unlink()
    assert "without config.json" in failure(capsys, "merge", folders.base, folders.adapter, tmp_path / "out")


@pytest.mark.parametrize("command", ["merge", "export", "import"])
def test_help_and_wrong_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for words in ("BASE", "OUTPUT appears whole or not at all", "Exit status", "--overwrite"):
        assert words in printed
    with pytest.raises(SystemExit) as stopped:
        run(command, "one", "two", "three", "--dtype" if command != "import" else "--from", "nonsense")
    assert stopped.value.code == 2
