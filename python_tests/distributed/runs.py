"""`loraxs train` in several processes: uninterrupted, interrupted, resumed; under DDP and under accelerate's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch
from accelerate.utils import DistributedType
from transformers import TrainerState

from loraxs_ext.training import make_run
from loraxs_ext.training.train import train
from loraxs_ext.training.trainer import Keeper
from python_tests.training.tiny import reviews, save_bert, save_llama, sums, write_jsonl

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}

# Without an accelerator, `loraxs train` has to find out by itself.
TOLD_CPU = torch.accelerator.is_available()


class Interrupted(Exception):
    """Stands for the power cut."""


def prepare(folder: Path) -> None:
    """Model and data; as many rows as fill every batch of two processes."""
    save_llama(folder / "llama")
    write_jsonl(folder / "train.jsonl", sums(32))
    write_jsonl(folder / "dev.jsonl", sums(8, seed=1))
    save_bert(folder / "bert", dropout=0.0)
    write_jsonl(folder / "reviews.jsonl", reviews(32))
    write_jsonl(folder / "dev reviews.jsonl", reviews(8, seed=1))


def values(folder: Path, output: str, batch: int) -> dict[str, Any]:
    data = {"train": str(folder / "train.jsonl"), "dev": str(folder / "dev.jsonl"), "answer": "answer"}
    steps = {"epochs": 2, "batch": batch, "log_steps": 1, "checkpoint_steps": 3, "lr": 1e-2, "cpu": TOLD_CPU}
    return {
        "task": "instruction",
        "output": str(folder / output),
        "model": {"name": str(folder / "llama")},
        "adapter": {"r": 8, "lora_alpha": 8},
        "data": {**data, "template": "plain", "max_length": 24},
        "training": steps,
    }


def reviews_run(folder: Path, output: str, **steps: int) -> dict[str, Any]:
    """The values of a classifier's run: a loss per row, a head that is trained completely."""
    return {
        "output": str(folder / output),
        "model": {"name": str(folder / "bert")},
        "adapter": {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value"]},
        "data": {"train": str(folder / "reviews.jsonl"), "dev": str(folder / "dev reviews.jsonl")},
        "training": {"max_steps": 4, "log_steps": 1, "cpu": TOLD_CPU, **steps},
    }


def train_all(folder: Path) -> dict[str, Any]:
    """The results of all runs, on every process."""
    found: dict[str, Any] = {}
    for name, context in {"DDP": nullcontext, "FSDP2": fsdp2_on_cpus}.items():
        with context(), _noting() as seen:
            found[f"{name}, at once"] = train(make_run(values(folder, f"{name} at once", 4)))
            interrupted = make_run(values(folder, f"{name} interrupted", 4))
            with _interrupted_at(5), pytest.raises(Interrupted):
                train(interrupted)
            seen.clear()
            found[f"{name}, interrupted"] = train(interrupted)
        found[f"{name}, kind"], found[f"{name}, first step"] = seen[0]
    found["classifier"] = train(make_run(reviews_run(folder, "classifier", batch=4)))
    return found


@contextmanager
def _interrupted_at(step: int) -> Iterator[None]:
    def stop(self: Keeper, args: object, state: TrainerState, *rest: object, **_: object) -> None:
        if state.global_step == step:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "on_step_begin", stop)
        yield


@contextmanager
def _noting() -> Iterator[list[tuple[str, int]]]:
    """The kind of the first parameter, and the step that training began at."""
    seen: list[tuple[str, int]] = []
    begin = Keeper.on_train_begin

    def note(self: Keeper, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        begin(self, args, state, control, **more)
        seen.append((type(next(more["model"].parameters()).data).__name__, state.global_step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "on_train_begin", note)
        yield seen


@contextmanager
def fsdp2_on_cpus() -> Iterator[None]:
    """What `accelerate launch` sets up for FSDP2, on CPUs too, where accelerate ignores it."""
    state = accelerate.state.AcceleratorState
    start = state.__init__

    def started(self: Any, *arguments: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        start(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if hasattr(self, "fsdp_plugin"):
            self.distributed_type = DistributedType.FSDP

    with pytest.MonkeyPatch.context() as patch:
        for name, value in FSDP2.items():
            patch.setenv(name, value)
        patch.setattr(state, "__init__", started)
        yield
