"""Train one adapter for one task, keep it on disk with its measurements, and reuse it when nothing has changed."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraxs_ext
from loraxs_ext.files import atomic_folder

from .data import Task
from .model import TextClassifier, count_trainable
from .train import Curve, Settings, correct, predict, train_adapter

WEIGHTS = "adapter_model.safetensors"
RECORD = "training.json"
LOGITS = "test_logits.safetensors"


@dataclass(frozen=True)
class AdapterBytes:
    """What a saved adapter occupies, in bytes.

    matrices: the trained low-rank tensors (R, or LoRA's A and B).
    head: the task's classification head.
    other: the fingerprint that ties R to its basis, and whatever else the file holds.
    file: the whole safetensors file, header included.
    """

    matrices: int
    head: int
    other: int
    file: int


@dataclass(frozen=True)
class Score:
    """Share of test rows answered rightly, its standard error, and the number of rows."""

    accuracy: float
    error: float
    rows: int

    @classmethod
    def of(cls, right: Tensor) -> Score:
        """The score of bool [rows]."""
        accuracy = right.double().mean().item()
        return cls(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(right)), len(right))


@dataclass(frozen=True)
class Trained:
    """A trained, saved adapter.

    trainable, head: trainable parameters in the adapter, and in the head.
    seconds: how long training took, when it was done.
    reused: whether that was in an earlier run.
    """

    folder: Path
    score: Score
    curve: Curve
    trainable: int
    head: int
    seconds: float
    bytes: AdapterBytes
    reused: bool

    def test_logits(self) -> Tensor:
        """Logits [rows, width] on the test rows, noted right after training."""
        return load_file(self.folder / LOGITS)["logits"]


def train_or_reuse(
    folder: Path,
    build: Callable[[], tuple[TextClassifier, PeftConfig]],
    task: Task,
    parts: dict[str, list[dict]],
    settings: Settings,
    *,
    fresh: bool,
    label: str,
) -> Trained:
    """Return the adapter in ``folder``, training it first unless one with the same settings and data is there.

    build: gives the frozen model and the adapter's config; called only when training.
    fresh: train in any case.
    """
    wanted = {"settings": asdict(settings), "data": _digest(task), "loraxs_ext": loraxs_ext.__version__}
    if not fresh and (known := _read(folder, wanted)) is not None:
        return known
    # The old adapter goes only when the new one is complete.
    with atomic_folder(folder, overwrite=True) as staged, tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(settings.seed)
        model: PeftModel = get_peft_model(*build())
        trainable, head = count_trainable(model)
        curve, seconds = train_adapter(model, parts, settings, Path(scratch), label)
        logits = predict(model, parts["test"], label="  test")
        model.save_pretrained(str(staged))
        save_file({"logits": logits}, staged / LOGITS)
        score = Score.of(correct(logits, parts["test"]))
        facts = {"trainable": trainable, "head": head, "seconds": seconds}
        record = {"wanted": wanted, "score": asdict(score), "curve": asdict(curve), **facts}
        (staged / RECORD).write_text(json.dumps(record, indent=1))
    return Trained(folder, score, curve, **facts, bytes=measure_bytes(folder), reused=False)


def measure_bytes(folder: Path) -> AdapterBytes:
    """Sum the tensors of a saved adapter by what they are."""
    sizes = {"matrices": 0, "head": 0, "other": 0}
    for name, tensor in load_file(folder / WEIGHTS).items():
        low_rank = name.endswith(".weight") and ("loraxs_R" in name or "lora_A" in name or "lora_B" in name)
        kind = "matrices" if low_rank else "head" if ".head." in name else "other"
        sizes[kind] += tensor.numel() * tensor.element_size()
    return AdapterBytes(**sizes, file=(folder / WEIGHTS).stat().st_size)


@dataclass(frozen=True)
class SavedSize:
    """What a saved adapter amounts to: parameters in the adapter and in the head, and bytes on disk."""

    trainable: int
    head: int
    bytes: AdapterBytes


def saved_size(build: Callable[[], tuple[TextClassifier, PeftConfig]]) -> SavedSize:
    """Save an untrained adapter of this config for real and look at the file."""
    model = get_peft_model(*build())
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return SavedSize(*count_trainable(model), measure_bytes(Path(scratch)))


def _read(folder: Path, wanted: dict) -> Trained | None:
    """The adapter in ``folder`` if it is complete and made from what is ``wanted``."""
    if not all((folder / file).is_file() for file in (WEIGHTS, RECORD, LOGITS)):
        return None
    record = json.loads((folder / RECORD).read_text())
    if record["wanted"] != wanted:
        return None
    facts = {key: record[key] for key in ("trainable", "head", "seconds")}
    score, curve = Score(**record["score"]), Curve(**record["curve"])
    return Trained(folder, score, curve, **facts, bytes=measure_bytes(folder), reused=True)


def _digest(task: Task) -> str:
    """A hash of every row of the task, so that other data is never taken for the same."""
    rows = [(part.texts, part.labels) for part in (task.train, task.dev, task.test)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
