"""One model in memory, all adapters in one batch, and the proof that every row gets what its adapter gives alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel
from torch import Tensor

from .data import Task
from .model import TextClassifier, load_encoder
from .train import collate

BASE = "__base__"  # PEFT's name for a row that uses no adapter
# Sums run in another order when a batch has another shape; after six blocks in fp32 that is about 1e-5 here.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answer:
    """A row of the mixed batch for the report; without an adapter there is no answer and ``right`` is None."""

    adapter: str
    text: str
    answer: str
    right: bool | None


@dataclass(frozen=True)
class Served:
    """What one mixed batch showed.

    rows: number of rows, in equal shares for every adapter and the base model.
    difference: per adapter the largest difference of any logit or embedding entry to its rows served alone; for BASE
        to the same rows through a model that never met an adapter.
    reload_difference: per adapter the largest difference of any logit to the one noted right after training.
    contrast: the smallest, over pairs of adapters, of the largest difference they make on the same rows; it shows that
        the first two could not be small by accident.
    mixed_seconds, alone_seconds: median time of the one batch, and of one batch per adapter with the same rows.
    answers: the first rows of the batch.
    """

    rows: int
    difference: dict[str, float]
    reload_difference: dict[str, float]
    contrast: float
    mixed_seconds: float
    alone_seconds: float
    answers: list[Answer]


def load_adapters(encoder_folder: Path, adapters: Mapping[str, Path], width: int) -> PeftModel:
    """Build a fresh model from the pretrained weights and load every adapter (name -> folder) into it, in eval mode."""
    model: PeftModel | TextClassifier = TextClassifier(load_encoder(encoder_folder), width)
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    assert isinstance(model, PeftModel)
    return model.eval()


@dataclass(frozen=True)
class _Row:
    """A row of the mixed batch: whose adapter serves it, and which test row of which task it is."""

    adapter: str
    task: Task
    number: int


@torch.inference_mode()
def serve_mixed(
    model: PeftModel,
    untouched: TextClassifier,
    tasks: Sequence[Task],
    examples: Mapping[str, Sequence[dict]],
    noted: Mapping[str, Tensor],
    share: int = 16,
    seed: int = 0,
) -> Served:
    """Serve ``share`` test rows of every task and as many without adapter in one shuffled batch, and check each row.

    model: with one adapter per task, by the task's name.
    untouched: the same pretrained model that never met an adapter; rows without one must equal what it gives.
    examples: task -> its tokenised test rows, at least ``share``.
    noted: task -> logits [rows, width] of all its test rows right after training.
    """
    names = [*(task.name for task in tasks), BASE]
    rows = [_Row(task.name, task, number) for task in tasks for number in range(share)]
    # Rows without an adapter are texts of all tasks in turn.
    rows += [_Row(BASE, tasks[i % len(tasks)], i) for i in range(share)]
    random.Random(seed).shuffle(rows)
    batch = collate([examples[row.task.name][row.number] for row in rows])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    adapters = [row.adapter for row in rows]
    own = {name: torch.tensor([adapter == name for adapter in adapters]) for name in names}

    def alone(name: str, select: Tensor | None = None) -> dict[str, Tensor]:
        chosen = inputs if select is None else {key: value[select] for key, value in inputs.items()}
        if name == BASE:
            return untouched(**chosen)
        model.set_adapter(name)
        return model(**chosen)

    mixed = model(**inputs, adapter_names=adapters)
    difference, reload_difference = {}, {}
    for name in names:
        single = alone(name, own[name])
        difference[name] = max(_largest(mixed[key][own[name]] - single[key]) for key in ("logits", "embedding"))
        if name != BASE:
            order = [row.number for row in rows if row.adapter == name]
            reload_difference[name] = _largest(single["logits"] - noted[name][order])
    everywhere = [alone(name)["embedding"] for name in names]
    contrast = min(_largest(p - q) for i, p in enumerate(everywhere) for q in everywhere[:i])
    return Served(
        rows=len(rows),
        difference=difference,
        reload_difference=reload_difference,
        contrast=contrast,
        mixed_seconds=_timed(lambda: model(**inputs, adapter_names=adapters)),
        alone_seconds=_timed(lambda: [alone(name, own[name]) for name in names]),
        answers=[_answer(row, logits) for row, logits in zip(rows[:12], mixed["logits"], strict=False)],
    )


def _answer(row: _Row, logits: Tensor) -> Answer:
    text = row.task.test.texts[row.number]
    if row.adapter == BASE:
        return Answer(BASE, text, "an embedding", None)
    label = int(logits[: len(row.task.classes)].argmax())
    return Answer(row.adapter, text, row.task.classes[label], label == row.task.test.labels[row.number])


def shown(difference: float) -> str:
    """A difference for people: "0" only when it is exactly that."""
    return f"{difference:.1e}" if difference else "0"


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def _timed(call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of ``call`` over ``repeats`` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
