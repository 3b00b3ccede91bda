"""`loraxs init`: the bases of a model folder, prepared once for everyone who adapts it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraxs_ext import LoraXSConfig
from loraxs_ext.basis import BasisFile, Factors, decomposition, fingerprint, fit_error
from loraxs_ext.checkpoint import model_folder
from loraxs_ext.commands import summary

from .command_line import run, told
from .peft.models import CASES, layers_of

ROOT = Path(__file__).parents[1]
PER_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of two layers in several shards, in bf16."""
    CASES["llama"].base(dtype=torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of matrices of each decomposition that was really computed."""
    counts: list[int] = []
    solve = decomposition.solve

    def counting(stack: torch.Tensor, *rest: Any) -> Any:
        counts.append(len(stack))
        return solve(stack, *rest)

    monkeypatch.setattr(decomposition, "solve", counting)
    return counts


def init(*arguments: object) -> int:
    return run("init", *arguments)


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    return told(capsys, "init", *arguments)


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert init(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("loraxs init: ")
    return printed.err


def test_table_of_all_modules(folder: Path, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert init(folder, "--rank", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "shape", "rank", "energy", "error", "seconds"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert set(rows) >= {f"model.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn.q_proj", "mlp.down_proj")}
    assert rows["model.layers.0.self_attn.v_proj"][:2] == ["16×32", "4"] and len(rows) == 14
    assert lines[-1].startswith("14 modules in ") and lines[-1].endswith(f"cached in {cache}")


def test_numbers_are_those_of_a_complete_svd(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = {m["name"]: m for m in report(capsys, folder, "--rank", 4, "--rank-pattern", "o_proj=7")["modules"]}
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in modules.items():
        W = model.get_submodule(name).weight.detach().double()
        s = torch.linalg.svdvals(W)
        rank = 7 if name.endswith("o_proj") else 4
        assert module["rank"] == rank and module["shape"] == list(W.shape)
        assert module["energy"] == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=1e-4)
        assert 0 <= module["subspace_error"] <= 1e-3 and module["seconds"] > 0


def test_get_peft_model_finds_everything_in_the_cache(
    folder: Path, capsys: pytest.CaptureFixture[str], solved: list[int]
) -> None:
    report(capsys, folder, "--rank", 4, "--sigma", "sqrt", "--tol", "1e-4")
    assert sum(solved) == 14
    solved.clear()
    config = {"r": 4, "sigma": "sqrt", "target_modules": "all-linear"}
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        adapted = get_peft_model(model, LoraXSConfig(svd_tol=1e-4, **config))
        assert len(layers_of(adapted)) == 14
    assert solved == []
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraXSConfig(**config))
    assert sum(solved) == 14, "another recipe is another basis"


def test_what_is_cached_is_not_computed_again(
    folder: Path, capsys: pytest.CaptureFixture[str], solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = model_folder.WeightStream.read
    left = 5

    def interrupted(self: model_folder.WeightStream, target: model_folder.Target) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("the disk went away")
        return read(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(model_folder.WeightStream, "read", interrupted)
        assert "the disk went away" in failure(capsys, folder, "--rank", 4)
    assert sum(solved) == 5
    first = report(capsys, folder, "--rank", 4)
    assert sum(solved) == 14
    second = report(capsys, folder, "--rank", 4)
    assert sum(solved) == 14
    for one, two in zip(first["modules"], second["modules"], strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_one_shard_is_open_at_a_time(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    now = 0
    real = model_folder.safe_open

    class Watched:
        def __init__(self, path: Path, **options: Any) -> None:
            self.path, self.file = path, real(path, **options)

        def __enter__(self) -> Any:
            nonlocal now
            now += 1
            assert now == 1
            opened.append(self.path.name)
            self.entered = self.file.__enter__()
            return self

        def __exit__(self, *reason: Any) -> None:
            nonlocal now
            now -= 1
            self.file.__exit__(*reason)

        def get_tensor(self, name: str) -> torch.Tensor:
            return self.entered.get_tensor(name)

    monkeypatch.setattr(model_folder, "safe_open", Watched)
    report(capsys, folder, "--rank", 4)
    assert now == 0 and len(opened) > 2 and opened == sorted(set(opened))


def test_output_serves_as_basis_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], solved) -> None:
    output, anchors = tmp_path / "out" / "bases.safetensors", tmp_path / "anchors.safetensors"
    told = report(capsys, folder, "--rank", 4, "--output", output, "--anchors", anchors)
    assert told["output"] == str(output) and told["anchors"] == str(anchors)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with BasisFile(output) as file, BasisFile(anchors) as small:
        assert file.address == small.address == told["address"] and not small.has_factors
        for name, module in file.modules.items():
            W = model.get_submodule(name).weight
            assert module.fingerprint == fingerprint(W) and fit_error(file.factors(name), W, "A") < 1e-5
    solved.clear()
    config = LoraXSConfig(r=4, target_modules="all-linear", basis_file=str(output))
    assert len(layers_of(get_peft_model(model, config))) == 14 and solved == []


def test_dtype_is_that_in_which_the_model_will_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], solved: list[int]
) -> None:
    CASES["llama"].base().save_pretrained(tmp_path / "fp32")
    report(capsys, tmp_path / "fp32", "--rank", 3, "--dtype", "bf16")
    solved.clear()
    config = LoraXSConfig(r=3, target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16), config)
    assert solved == []
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "fp32"), config)
    assert sum(solved) == 14


@pytest.mark.parametrize("name", CASES)
def test_architectures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], solved: list[int]) -> None:
    """Transposed weights (GPT-2), an encoder-decoder, a classifier: the keys and bits are those of the tuner."""
    case = CASES[name]
    case.base().save_pretrained(tmp_path / name)
    told = report(capsys, tmp_path / name, "--rank", 4, "--target-modules", *case.targets)
    solved.clear()
    model = type(case.base()).from_pretrained(tmp_path / name)
    adapted = get_peft_model(model, LoraXSConfig(r=4, target_modules=list(case.targets)))
    assert {m["name"] for m in told["modules"]} == {layer.key for layer in layers_of(adapted)} and solved == []


def test_a_checkpoint_of_the_body_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], solved: list[int]) -> None:
    body = CASES["bert"].base().bert
    body.save_pretrained(tmp_path / "body")
    config = json.loads((tmp_path / "body" / "config.json").read_text())
    (tmp_path / "body" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    targets = ["query", "value"]
    told = report(capsys, tmp_path / "body", "--rank", 4, "--target-modules", *targets)
    assert {m["name"] for m in told["modules"]} == {
        f"bert.encoder.layer.{i}.attention.self.{kind}" for i in (0, 1) for kind in targets
    }
    solved.clear()
    get_peft_model(AutoModel.from_pretrained(tmp_path / "body"), LoraXSConfig(r=4, target_modules=targets))
    assert solved == []


def test_tied_weights_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    told = report(capsys, tmp_path / "tied", "--rank", 4, "--target-modules", "lm_head")
    assert [(m["name"], m["shape"]) for m in told["modules"]] == [("lm_head", [40, 32])]


def test_targets_and_exclusions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names(*arguments: object) -> set[str]:
        return {m["name"].rpartition(".")[2] for m in report(capsys, folder, "--rank", 2, *arguments)["modules"]}

    assert names() == set(PER_LAYER)
    assert names("--exclude-modules", "gate_proj", "up_proj") == set(PER_LAYER) - {"gate_proj", "up_proj"}
    assert names("--target-modules", "q_proj", "v_proj") == {"q_proj", "v_proj"}
    assert names("--target-modules", "k_proj") == {"k_proj"}
    assert names("--target-modules", r".*\.0\..*(q|o)_proj") == {"q_proj", "o_proj"}


def test_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert init(folder, "--rank", 4, "--plot", tmp_path / "spectra.png") == 0
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG") and "plot: " in capsys.readouterr().out


def test_plot_without_matplotlib_is_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, solved: list[int]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "loraxs-ext[demo]"' in failure(capsys, folder, "--plot", "x.png")
    assert solved == []


def test_missed_tolerances_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    modules = [
        summary.ModuleBasis("a", (4, 4), 2, 0.5, 1e-5, 0.1, (2.0, 1.0)),
        summary.ModuleBasis("b", (4, 4), 2, 0.5, 2e-3, 0.1, (1.0, 1.0)),
    ]
    lines = summary.as_text(modules, 1e-3).splitlines()
    assert "!" not in lines[1] and "2.0e-03 !" in lines[2] and "1 of 2 modules miss" in lines[3]


# What goes wrong


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere without config.json" in failure(capsys, tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())

    def folder_with(name: str, **changes: Any) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
        return tmp_path / name

    bare = folder_with("bare")
    (bare / "pytorch_model.bin").write_bytes(b"pickle")
    assert "must hold model.safetensors" in failure(capsys, bare)
    quantised = folder_with("quantised", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "stored quantised" in failure(capsys, quantised)
    outside = folder_with("outside")
    (outside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model/secret"}}))
    assert "names files outside of its folder" in failure(capsys, outside)
    poor = folder_with("poor")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}, poor / "model.safetensors")
    assert "lacks 13 of 14 targeted weights, such as 'model." in failure(capsys, poor)
    torn = folder_with("torn")
    (torn / "model.safetensors").write_bytes(b"\x10\0\0")
    assert init(torn) == 1 and "loraxs init: " in capsys.readouterr().err


def test_weights_that_cannot_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next(f for f in sorted(folder.glob("*.safetensors")) if any("down_proj" in name for name in load_file(f)))
    tensors = load_file(shard)
    name = next(name for name in tensors if "down_proj" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], math.nan)}, shard)
    assert f"weight {name.removesuffix('.weight')!r} contains NaN" in failure(capsys, folder, "--rank", 4)
    save_file({**tensors, name: torch.zeros(3, 4)}, shard)
    assert "must have shape (32, 48), got" in failure(capsys, folder, "--rank", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank", "0"), "r: expected a positive integer, got 0"),
        (("--sigma", "C"), "sigma must be one of"),
        (("--tol", "2"), "tol must lie between 0 and 1"),
        (("--svd", "exact", "--vectors", "best"), "vectors must be one of"),
        (("--target-modules", "no_such_layer"), "no_such_layer"),
        (("--output", "."), "got the folder ."),
    ],
)
def test_bad_values_are_named(
    arguments: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(capsys, folder, *arguments)


@pytest.mark.parametrize("arguments", ["", "x --rank many", "x --rank-pattern q", "x --dtype 8"])
def test_wrong_usage(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        init(*arguments.split())
    assert stopped.value.code == 2 and "usage: loraxs init" in capsys.readouterr().err


def test_help_tells_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        init("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for words in ("MODEL", "--rank-pattern NAME=R", "Exit status", "torchrun", "LORAXS_CACHE", "basis_file"):
        assert words in told


def test_torchrun(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes, each with half of the work; one prints."""
    alone = report(capsys, folder, "--rank", 4, "--output", tmp_path / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "loraxs_ext.cli",
        "init",
        str(folder),
        "--rank",
        "4",
        "--output",
        str(tmp_path / "both"),
        "--json",
    ]
    environment = {**os.environ, "LORAXS_CACHE": str(tmp_path / "other cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)
    assert both["address"] == alone["address"]
    assert [m["energy"] for m in both["modules"]] == pytest.approx([m["energy"] for m in alone["modules"]])

    def factors(name: str) -> list[Factors]:
        with BasisFile(tmp_path / name) as file:
            return [file.factors(module) for module in file.modules]

    for one, two in zip(factors("alone"), factors("both"), strict=True):
        torch.testing.assert_close(one.bt.mT @ one.a, two.bt.mT @ two.a, rtol=1e-4, atol=1e-4)
