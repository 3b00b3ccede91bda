"""Tables and figures of `benchmarks.advice`, of whatever runs there are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._tables import Result, Row, table


def chosen(rows: Sequence[Row], **arm: Any) -> list[Row]:
    """The runs of an arm at its learning rate, that of least dev loss with the first seed, by seed; none if none."""
    runs = sorted((row for row in rows if all(row[k] == v for k, v in arm.items())), key=lambda row: row["seed"])
    if not runs:
        return []
    best = min((row for row in runs if row["seed"] == runs[0]["seed"]), key=lambda row: row["dev_loss"])
    return [row for row in runs if row["lr"] == best["lr"]]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; that of a single value is NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def paired(ours: Sequence[Row], theirs: Sequence[Row], field: str) -> tuple[float, float]:
    """Mean of the differences ours − theirs of the seeds that both have, and its standard error over them."""
    other = {row["seed"]: row[field] for row in theirs}
    differences = [row[field] - other[row["seed"]] for row in ours if row["seed"] in other]
    mean, spread = mean_and_spread(differences)
    return mean, spread / len(differences) ** 0.5


def comparisons(result: Result) -> list[dict[str, Any]]:
    """Advised against uniform, one entry per task and budget that has runs of both."""
    rows = result["rows"]
    found = []
    for task, budget in dict.fromkeys((row["task"], row["budget"]) for row in rows):
        arm = {"task": task, "budget": budget, "vectors": "top", "gain": "own"}
        uniform, advised = (chosen(rows, ranks=ranks, **arm) for ranks in ("uniform", "advised"))
        if uniform and advised:
            found.append({"task": task, "budget": budget, "uniform": uniform, "advised": advised})
    return found


def tables(result: Result) -> str:
    """Both comparisons as Markdown, in percent and points."""
    return "\n\n".join(part for part in (_allocations(result), _vectors(result)) if part)


def _allocations(result: Result) -> str:
    lines = []
    for cell in comparisons(result):
        uniform, advised = cell["uniform"], cell["advised"]
        points, error = paired(advised, uniform, "test_accuracy")
        loss, loss_error = paired(advised, uniform, "test_loss")
        promise = statistics.fmean(result["advice"][f"{cell['task']}, {cell['budget']}"]["promise"])
        lines.append(
            [
                f"{cell['task']}, {cell['budget']:,}",
                _accuracy(uniform),
                _accuracy(advised),
                f"{100 * points:+.1f} ± {100 * error:.1f}",
                f"{loss:+.3f} ± {loss_error:.3f}",
                f"{promise:+.0%}",
            ]
        )
    if not lines:
        return ""
    header = [
        "task, parameters",
        "uniform",
        "advised",
        "difference, points",
        "difference of test loss",
        "energy gained",
    ]
    title = (
        "Test accuracy in percent (mean ± standard deviation over seeds) with one rank for all modules and with "
        "advised ranks, and the paired difference ± its standard error over seeds."
    )
    return f"{title}\n\n{table(header, lines)}"


def _vectors(result: Result) -> str:
    rows = result["rows"]
    lines = []
    for gain in ("own", "equal"):
        for vectors in ("top", "middle", "bottom", "random"):
            runs = chosen(_ablated(rows), vectors=vectors, gain=gain)
            if runs:
                loss, spread = mean_and_spread([row["test_loss"] for row in runs])
                lines.append(
                    [f"{vectors}, {gain} gain", f"{runs[0]['lr']:g}", _accuracy(runs), f"{loss:.3f} ± {spread:.3f}"]
                )
    if not lines:
        return ""
    return f"Which singular vectors.\n\n{table(['vectors', 'lr', 'accuracy', 'test loss'], lines)}"


def _ablated(rows: Sequence[Row]) -> list[Row]:
    """Runs of the task and size of which there are other vectors than the top ones, at uniform ranks."""
    where = {(row["task"], row["budget"]) for row in rows if row["vectors"] != "top" or row["gain"] != "own"}
    return [row for row in rows if (row["task"], row["budget"]) in where and row["ranks"] == "uniform"]


def _accuracy(runs: Sequence[Row]) -> str:
    mean, spread = mean_and_spread([100 * row["test_accuracy"] for row in runs])
    return f"{mean:.1f} ± {spread:.1f} (n = {len(runs)})"


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """One figure: accuracy of every seed with both allocations, and by singular vectors; as SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))

    def dots(axis: Any, place: float, runs: Sequence[Row], color: str, label: str | None) -> None:
        values = [100 * row["test_accuracy"] for row in runs]
        axis.plot([place] * len(values), values, "o", ms=4, color=color, alpha=0.6, label=label)
        axis.plot([place - 0.12, place + 0.12], [statistics.fmean(values)] * 2, color=color)

    cells = comparisons(result)
    for i, cell in enumerate(cells):
        for offset, ranks, color in ((-0.18, "uniform", "tab:orange"), (0.18, "advised", "tab:blue")):
            dots(left, i + offset, cell[ranks], color, ranks if i == 0 else None)
    left.set_xticks(range(len(cells)), [f"{cell['task']}\n{cell['budget']:,}" for cell in cells], fontsize=7)
    rows = _ablated(result["rows"])
    kinds = ("top", "middle", "bottom", "random")
    for i, vectors in enumerate(kinds):
        for offset, gain, color in ((-0.18, "own", "tab:green"), (0.18, "equal", "tab:purple")):
            if runs := chosen(rows, vectors=vectors, gain=gain):
                dots(right, i + offset, runs, color, f"{gain} gain" if vectors == "top" else None)
    right.set_xticks(range(len(kinds)), kinds, fontsize=8)
    for axis, title in ((left, "ranks, at equal parameters"), (right, "singular vectors, at equal rank")):
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("test accuracy, %", fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "advice.svg", folder / ".advice.svg.partial"
    figure.savefig(partial, format="svg")
    partial.replace(path)
    return [path]
