"""`loraxs advise`: from a folder and a file to ranks that are ready to use."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loraxs_ext import LoraXSConfig
from loraxs_ext.commands import summary

from .advisor.test_calibration import save_model, write
from .command_line import run, told
from .peft.models import layers_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def decoder(tmp_path: Path) -> list[object]:
    """What `loraxs advise` needs for a causal model."""
    return [save_model(tmp_path / "llama", "llama"), "--data", write(tmp_path / "a.jsonl"), "--task", "causal"]


@pytest.fixture
def classifier(tmp_path: Path) -> list[object]:
    """And for a classifier."""
    return [save_model(tmp_path / "bert", "bert"), "--data", write(tmp_path / "a.csv"), "--task", "classification"]


def advise(*arguments: object) -> int:
    return run("advise", *arguments)


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    return told(capsys, "advise", *arguments)


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert advise(*arguments) == 1
    printed = capsys.readouterr()
    # After whatever bars transformers draws while it loads a model.
    assert printed.out == "" and "loraxs advise: " in printed.err
    return printed.err


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_the_advised_ranks_are_those_of_the_model_they_make(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = request.getfixturevalue(kind)
    found = report(capsys, *arguments, "--budget", 60, "--rank-max", 6, "--ranks", "advised")
    ranks = {module["name"]: module["advised"] for module in found["modules"]}
    assert 0 < sum(rank**2 for rank in ranks.values()) <= 60
    assert found["config"] == found["advised"] and found["choice"] == "advised"
    if kind == "decoder":
        model, task = AutoModelForCausalLM.from_pretrained(arguments[0]), "CAUSAL_LM"
    else:
        options = {"num_labels": 3, "ignore_mismatched_sizes": True}
        model, task = AutoModelForSequenceClassification.from_pretrained(arguments[0], **options), "SEQ_CLS"
        assert found["new_head"]
    layers = layers_of(get_peft_model(model, LoraXSConfig(task_type=task, **found["config"])))
    assert {layer.key: layer.r["default"] for layer in layers} == {name: r for name, r in ranks.items() if r}
    assert {layer.scaling["default"] for layer in layers} == {1.0}
    for module in found["modules"]:
        assert len(module["captured"]) == len(module["gained"]) == 6
        assert all(0 <= share <= 1 + 1e-5 for share in module["captured"])


def test_table_and_explanation(decoder: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert advise(*decoder, "--budget", 60, "--rank-max", 6) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].split() == ["module", "shape", "r=1", "r=4", "r=6", "gain", "uniform", "advised"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:16]}
    assert rows["model.layers.0.self_attn.v_proj"][0] == "16×32"
    assert {row[5] for name, row in rows.items() if name != "parameters"} == {"2"} and len(rows) == 15
    assert rows["parameters"][0] == "56" and int(rows["parameters"][1]) <= 60
    for part in ("Measured: ", "Found: of all ranks within 60 parameters", "How sure: ", "Advice: ", '"r": 2'):
        assert part in text


def test_the_same_every_time(classifier: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    options = (*classifier, "--budget", 100, "--rows", 20, "--seed", 3)
    assert report(capsys, *options) == report(capsys, *options)


def test_scaling_targets_and_exclusions(decoder: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--budget", 36, "--scaling", 2, "--target-modules", "q_proj", "v_proj", "up_proj")
    found = report(capsys, *decoder, *options, "--exclude-modules", "up_proj", "--ranks", "uniform")
    assert len(found["modules"]) == 4
    assert found["config"] == {
        "r": 3, "lora_alpha": 6.0, "target_modules": ["q_proj", "up_proj", "v_proj"], "exclude_modules": ["up_proj"]
    }  # fmt: skip


def test_no_uniform_rank_fits_a_tiny_budget(decoder: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *decoder, "--budget", 5)
    assert found["uniform"] is None and found["choice"] == found["recommended"] == "advised"
    assert sum(module["advised"] ** 2 for module in found["modules"]) <= 5
    assert "less than one parameter for each of the 14 modules" in found["explanation"]
    assert "no uniform rank fits into 5" in failure(capsys, *decoder, "--budget", 5, "--ranks", "uniform")


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_output_holds_what_is_printed(
    decoder: list[object], capsys: pytest.CaptureFixture[str], tmp_path: Path, ending: str
) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / f"advice.{ending}"
    found = report(capsys, *decoder, "--budget", 60, "--output", path)
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == found
    assert [name for name in os.listdir(tmp_path) if "partial" in name] == []


def test_gradients_that_take_several_passes_or_are_left_out(
    decoder: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    once = report(capsys, *decoder, "--budget", 60)
    assert report(capsys, *decoder, "--budget", 60, "--gradient-memory", 1e-5) == once
    without = report(capsys, *decoder, "--budget", 60, "--gradient-memory", 0)
    assert without["config"] == once["config"] and {m["captured"] for m in without["modules"]} == {None}
    assert advise(*decoder, "--budget", 60, "--gradient-memory", 0) == 0
    assert "–" in capsys.readouterr().out


def test_plot(decoder: list[object], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "advice.png"
    assert advise(*decoder, "--budget", 60, "--plot", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", 0), "--budget: expected at least 1, got 0"),
        (("--budget", 9, "--rows", 0), "--rows: expected at least 1"),
        (("--budget", 9, "--scaling", -1), "--scaling: expected a positive number"),
        (("--budget", 9, "--gradient-memory", "nan"), "--gradient-memory: expected at least 0 GiB"),
        (("--budget", 9, "--output", "advice.txt"), "--output: expected a .json or .yaml file"),
        (("--budget", 9, "--plot", "nowhere/a.png"), "expected a file in a folder that exists"),
        (("--budget", 9, "--rows", 8), "batches: expected at least 2"),
        (("--budget", 9, "--text-field", "body"), "line 1: expected a string .* under 'body'"),
        (("--budget", 9, "--task", "classification", "--label-field", "y"), "line 1: .* under 'y'"),
        (("--budget", 9, "--target-modules", "nothing"), "Target modules"),
        (("--budget", 9, "--device", "nonsense"), "nonsense"),
    ],
)
def test_what_is_wrong_is_named(
    decoder: list[object], capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    assert re.search(message, failure(capsys, *decoder, *options))


def test_missing_files_are_named(decoder: list[object], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nothing.csv" in failure(capsys, *decoder[:2], tmp_path / "nothing.csv", *decoder[3:], "--budget", 9)
    assert "MODEL: expected a folder" in failure(capsys, tmp_path / "none", *decoder[1:], "--budget", 9)


def test_a_plot_without_matplotlib_is_refused_before_any_work(
    decoder: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(summary.importlib.util, "find_spec", lambda name: None)
    assert "loraxs-ext[" in failure(capsys, *decoder, "--budget", 9, "--plot", tmp_path / "a.png")


def test_help_shows_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        advise("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--budget" in text and "examples:" in text and "LoraXSConfig(" in text


def test_a_cuda_model_is_measured_where_it_is(decoder: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert report(capsys, *decoder, "--budget", 60, "--device", "cuda")["modules"]
