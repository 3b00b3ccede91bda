"""What a run of the demo found: the numbers, the checks they must pass, the table, and the JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraxs_ext.files import atomic_file

from .adapters import SavedSize, Score, Trained
from .data import Task
from .report import Table
from .serve import TOLERANCE, Served, shown
from .spectra import Decomposition
from .train import Baseline, Settings

OURS = "LoRA-XS"


@dataclass(frozen=True)
class Check:
    """A claim of the report and whether it holds."""

    claim: str
    holds: bool


@dataclass(frozen=True)
class Outcome:
    """Everything the report says.

    trained: method -> task -> adapter; ``OURS`` is always among the methods.
    sizes: name of a plain LoRA -> what it occupies.
    seconds: wall-clock of the whole run.
    """

    settings: Settings
    quick: bool
    tasks: Sequence[Task]
    baselines: Mapping[str, Baseline]
    trained: Mapping[str, Mapping[str, Trained]]
    sizes: Mapping[str, SavedSize]
    decomposition: Decomposition
    served: Served
    encoder_bytes: int
    seconds: float
    versions: Mapping[str, str]

    def ours(self, task: Task) -> Trained:
        """The LoRA-XS adapter of a task."""
        return self.trained[OURS][task.name]

    def base(self, task: Task) -> Score:
        """The frozen base's score on a task."""
        return Score.of(self.baselines[task.name].correct)

    def gain(self, task: Task) -> tuple[float, float]:
        """Accuracy of LoRA-XS minus that of the frozen base, and its standard error, on the same test rows."""
        right = self.ours(task).test_logits().argmax(-1) == torch.tensor(task.test.labels)
        difference = right.double() - self.baselines[task.name].correct.double()
        return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))

    def checks(self) -> list[Check]:
        """The claims of this run. A quick run sees too few rows to claim accuracy: it claims that the loss falls."""
        served = self.served
        worst, reloaded = max(served.difference.values()), max(served.reload_difference.values())
        found = [
            Check(
                f"all {served.rows} rows of the mixed batch equal what their adapter gives alone: largest difference"
                f" {shown(worst)}, limit {TOLERANCE:.0e}",
                worst <= TOLERANCE,
            ),
            Check(
                f"adapters reloaded from disk give the logits noted after training: largest difference"
                f" {shown(reloaded)}, limit {TOLERANCE:.0e}",
                reloaded <= TOLERANCE,
            ),
            Check(
                f"another adapter would change the same rows by at least {served.contrast:.2g},"
                f" so the two checks above cannot pass by accident (least {100 * TOLERANCE:.0e})",
                served.contrast >= 100 * TOLERANCE,
            ),
        ]
        for task in self.tasks:
            if self.quick:
                loss = self.ours(task).curve.loss
                third = max(1, len(loss) // 3)
                first, last = sum(loss[:third]) / third, sum(loss[-third:]) / third
                found.append(Check(f"{task.title}: training loss falls from {first:.2f} to {last:.2f}", last < first))
            else:
                ours, base = self.ours(task).score.accuracy, self.base(task).accuracy
                gain, error = self.gain(task)
                claim = (
                    f"{task.title}: LoRA-XS answers {ours:.1%} of the test rows rightly, more than the frozen base with"
                    f" a trained head, {base:.1%}; difference {100 * gain:+.1f} ± {100 * error:.1f} points"
                )
                found.append(Check(claim, ours > base))
        return found

    def table(self) -> Table:
        """One row a task and method."""
        head = ("task", "method", "accuracy %", "gain, points", "parameters", "adapter B", "file B", "seconds")
        rows = []
        for task in self.tasks:
            spent = f"{self.baselines[task.name].seconds:.0f}"
            rows.append((task.title, "frozen base", _percent(self.base(task)), "", "0", "0", "", spent))
            for method, results in self.trained.items():
                result = results[task.name]
                gain = "{:+.1f} ± {:.1f}".format(*(100 * v for v in self.gain(task))) if method == OURS else ""
                size = result.bytes
                spent = f"{result.seconds:.0f}"
                cells = (f"{result.trainable:,}", f"{size.matrices:,}", f"{size.file:,}", spent)
                rows.append(("", method, _percent(result.score), gain, *cells))
        return Table(head, rows, text=(0, 1))

    def size_table(self) -> Table:
        """Parameters and bytes of LoRA-XS beside plain LoRAs that were saved for real."""
        ours = next(iter(self.trained[OURS].values()))
        sizes = {f"{OURS} r = {self.settings.rank}": SavedSize(ours.trainable, ours.head, ours.bytes), **self.sizes}
        rows = [
            (name, f"{size.trainable:,}", f"{size.bytes.matrices:,}", f"{size.head:,}", f"{size.bytes.file:,}")
            for name, size in sizes.items()
        ]
        return Table(("adapter", "parameters", "adapter B", "head parameters", "file B"), rows)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON-ready values, spectra and texts left out."""
        decomposition = {key: value for key, value in asdict(self.decomposition).items() if key != "spectra"}
        return {
            "settings": asdict(self.settings),
            "quick": self.quick,
            "seconds": self.seconds,
            "versions": dict(self.versions),
            "decomposition": decomposition,
            "tasks": {task.name: self._task_dict(task) for task in self.tasks},
            "plain_lora_sizes": {name: asdict(size) for name, size in self.sizes.items()},
            "encoder_bytes": self.encoder_bytes,
            "mixed_batch": {**asdict(self.served), "tolerance": TOLERANCE},
            "checks": [asdict(check) for check in self.checks()],
        }

    def _task_dict(self, task: Task) -> dict[str, Any]:
        gain, error = self.gain(task)
        methods = {}
        for method, results in self.trained.items():
            result = results[task.name]
            methods[method] = {**asdict(result), "folder": str(result.folder)}
        return {
            "title": task.title,
            "classes": list(task.classes),
            "rows": {"train": len(task.train), "dev": len(task.dev), "test": len(task.test)},
            "most_frequent_class": task.majority,
            "frozen_base": {**asdict(self.base(task)), "decay": self.baselines[task.name].decay},
            "gain": {"accuracy": gain, "error": error},
            "methods": methods,
        }


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either its old contents or all of the new ones."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, outcome: Outcome) -> None:
    """Write the numbers of ``outcome`` to ``path``."""
    write_text(path, json.dumps(outcome.to_dict(), indent=2) + "\n")


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} ± {100 * score.error:.1f}"
