"""What the runs of a results file amount to: a cell per method and task, and paired differences to one method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A method on a task.

    tried: learning rates that the first seed was trained with. rate: the chosen one, None before anything is scored.
    accuracy: test accuracy by seed. right: by seed, which test rows were answered rightly.
    """

    tried: tuple[float, ...]
    rate: float | None
    accuracy: Mapping[int, float]
    right: Mapping[int, str]

    @property
    def on_edge(self) -> bool:
        """Whether the chosen learning rate is the smallest or the largest of those tried."""
        return self.rate is not None and self.rate in (min(self.tried), max(self.tried))


def cells(content: Content) -> dict[str, dict[str, Cell]]:
    """method -> task -> cell, for all that have at least one run."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in content["rows"]:
        found.setdefault(row["method"], {}).setdefault(row["task"], []).append(row)
    return {method: {task: _cell(rows) for task, rows in by_task.items()} for method, by_task in found.items()}


def _cell(rows: Sequence[Mapping[str, Any]]) -> Cell:
    scored = {row["seed"]: row for row in rows if "test_accuracy" in row}
    return Cell(
        tried=tuple(sorted({row["rate"] for row in rows})),
        rate=next((row["rate"] for row in scored.values()), None),
        accuracy={seed: row["test_accuracy"] for seed, row in sorted(scored.items())},
        right={seed: row["test_right"] for seed, row in sorted(scored.items())},
    )


def differences(content: Content, anchor: str) -> dict[str, dict[str, Any]]:
    """Test accuracy minus that of `anchor`, paired by seed and by row; method -> task, and "all" for the mean of tasks.

    Each entry has the differences by seed, their mean, their spread (standard deviation over seeds; None for one), and
    the standard error of the mean that comes from the finite number of test rows.
    """
    table = cells(content)
    found: dict[str, dict[str, Any]] = {}
    for method, by_task in table.items():
        entries = {}
        for task, cell in by_task.items():
            reference = table.get(anchor, {}).get(task)
            if method != anchor and reference and (entry := _difference(cell, reference)):
                entries[task] = entry
        if entries:
            found[method] = {**entries, "all": _mean(list(entries.values()))}
    return found


def _difference(cell: Cell, reference: Cell) -> dict[str, Any] | None:
    seeds = [seed for seed in cell.accuracy if seed in reference.accuracy]
    if not seeds:
        return None
    by_seed = {str(seed): cell.accuracy[seed] - reference.accuracy[seed] for seed in seeds}
    pairs = zip(
        *(zip(cell.right[seed], reference.right[seed], strict=True) for seed in seeds),
        strict=True,
    )
    by_row = [sum((a == "1") - (b == "1") for a, b in row) / len(seeds) for row in pairs]
    return {
        "by_seed": by_seed,
        "mean": statistics.fmean(by_seed.values()),
        "spread": spread(list(by_seed.values())),
        "rows_error": statistics.stdev(by_row) / math.sqrt(len(by_row)),
    }


def _mean(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over tasks; their errors are independent, as their rows are."""
    return {
        "tasks": len(entries),
        "mean": statistics.fmean(entry["mean"] for entry in entries),
        "rows_error": math.hypot(*(entry["rows_error"] for entry in entries)) / len(entries),
    }


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for a single one."""
    return statistics.stdev(values) if len(values) > 1 else None
