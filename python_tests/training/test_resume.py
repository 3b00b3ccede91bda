"""A run that is killed goes on from its last checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from loraxs_ext.training import make_run
from loraxs_ext.training.folder import RunFolder
from loraxs_ext.training.train import train
from loraxs_ext.training.trainer import Keeper

yaml = pytest.importorskip("yaml")
pytest.importorskip("tensorboard")

ROOT = Path(__file__).parents[2]


def start(config: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "loraxs_ext.cli", "train", str(config), "--set", f"output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture
def curves(monkeypatch) -> list[list[dict]]:
    """The log of every training that ends in this process: what the Trainer's state then holds."""
    seen: list[list[dict]] = []

    def note(self: Keeper, args: object, state: TrainerState, control: object, **_: object) -> None:
        # The Trainer's own last entry sums up one session.
        entries = [entry for entry in state.log_history if "train_loss" not in entry]
        timeless = [
            {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second"))} for entry in entries
        ]
        seen.append(timeless)

    monkeypatch.setattr(Keeper, "on_train_end", note)
    return seen


def test_a_killed_run_ends_like_an_uninterrupted_one(review_run, tmp_path, curves):
    # Dropout in the model and in the adapter, so that the state of the random numbers matters.
    review_run["adapter"]["loraxs_dropout"] = 0.1
    review_run["training"] |= {"epochs": 8, "checkpoint_steps": 4, "log_steps": 3}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(review_run))
    killed = tmp_path / "killed"
    process = start(config, killed)
    try:
        while not any(killed.glob("checkpoint-*/complete.json")):
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "result.json").exists()
    left = RunFolder(killed).last_checkpoint()
    assert left is not None and (killed / "run.json").exists()

    again = train(make_run(review_run, {"output": str(killed)}))
    whole = train(make_run(review_run, {"output": str(tmp_path / "whole")}))
    assert whole["steps"] == again["steps"] == 40
    resumed, uninterrupted = curves
    assert len([entry for entry in uninterrupted if "loss" in entry]) > 15
    assert resumed == uninterrupted
    assert again["dev"] == whole["dev"] and again["best_step"] == whole["best_step"]
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("killed", "whole")
    )
    assert first.keys() == second.keys() and any("classifier" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_incomplete_checkpoint_is_not_used(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim({"a": 1}, {})
    for step in (5, 10, 15):
        (folder.path / f"checkpoint-{step}").mkdir()
        (folder.path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"x")
    assert folder.last_checkpoint() is None  # no one is complete, and they are gone
    for step, keep in ((5, "elsewhere/checkpoint-5"), (10, "elsewhere/checkpoint-5"), (15, "elsewhere/checkpoint-5")):
        (folder.path / f"checkpoint-{step}").mkdir()
        folder.complete(step, {"seconds": step}, keep)
    assert sorted(p.name for p in folder.path.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-5"]
    (folder.path / "checkpoint-20").mkdir()
    last = folder.last_checkpoint()
    assert last is not None and last.name == "checkpoint-15" and folder.facts_of(last) == {"seconds": 15}


def test_another_configuration_is_refused_with_the_difference(review_run):
    train(make_run(review_run, {"training.max_steps": 2}))
    with pytest.raises(ValueError, match=r"other settings(?s:.*)training\.lr: was 0\.005, is now 0\.006"):
        train(make_run(review_run, {"training.max_steps": 2, "training.lr": 6e-3}))
    path = Path(review_run["data"]["train"])
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"contents of\.data\.train"):
        train(make_run(review_run, {"training.max_steps": 2}))


def test_a_start_that_fails_leaves_the_folder_to_other_settings(review_run, monkeypatch):
    folder = Path(review_run["output"])
    with pytest.raises(OSError):
        train(make_run(review_run, {"model.name": str(folder.parent / "misspelt")}))
    assert not list(folder.iterdir())

    def too_large(self: Keeper, *_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("batch")

    monkeypatch.setattr(Keeper, "on_step_end", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        train(make_run(review_run, {"training.max_steps": 2}))
    monkeypatch.undo()
    assert train(make_run(review_run, {"training.max_steps": 2, "training.batch": 2}))["steps"] == 2
    assert {path.name for path in folder.iterdir()} == {"adapter", "result.json", "run.json", "tensorboard"}


def test_a_start_that_fails_after_a_checkpoint_keeps_its_settings(review_run, monkeypatch):
    def full(self: RunFolder) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(RunFolder, "new_adapter", full)
    with pytest.raises(OSError, match="no space left"):
        train(make_run(review_run, {"training.max_steps": 2}))
    with pytest.raises(ValueError, match="other settings"):
        train(make_run(review_run, {"training.max_steps": 3}))


def test_a_finished_run_is_left_as_it_is(review_run):
    values = {"training.max_steps": 2}
    first = train(make_run(review_run, values))
    folder = RunFolder(review_run["output"])
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    # What does not change the weights may change.
    assert train(make_run(review_run, {**values, "data.test": None, "training.eval_batch": 3})) == first
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    assert json.loads(folder.result.read_text()) == first
    assert not list(folder.path.glob("checkpoint-*"))


def test_a_folder_of_something_else_is_refused(review_run):
    folder = Path(review_run["output"])
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        train(make_run(review_run))
    assert [path.name for path in folder.iterdir()] == ["precious"]
