"""The table and the figure of the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._tables import table

from .methods import ANCHOR, METHODS
from .summary import Cell, cells, differences, spread

Content = Mapping[str, Any]


def markdown(content: Content) -> str:
    """The table with all that is known so far; what is missing shows as a dash or with the number of its seeds."""
    known = cells(content)
    tasks = list(content["tasks"])
    names = [name for name in dict.fromkeys([*METHODS, *known]) if name in known or name in content["methods"]]
    seeds = max((len(cell.accuracy) for row in known.values() for cell in row.values()), default=0)
    against = differences(content, ANCHOR)
    header = ["method", "trained numbers", "bytes", *tasks, "to LoRA-XS", "ms a step", "peak MiB"]
    lines = [
        ["most frequent class", "–", "–", *_plain(content, tasks, lambda task: task["majority"]), "", "", ""],
        [
            "converged head",
            "0",
            "0",
            *_plain(content, tasks, lambda task: task["converged_head"]["accuracy"]),
            "",
            "",
            "",
        ],
    ]
    for name in names:
        facts = content["methods"].get(name, {})
        lines.append(
            [
                name,
                _count(facts.get("parameters")),
                "0" if facts.get("parameters") == 0 else _count(facts.get("bytes")),
                *(_accuracy(known.get(name, {}).get(task), seeds) for task in tasks),
                _difference(against.get(name, {}).get("all"), len(tasks)) if name != ANCHOR else "0",
                *_speed(content, name),
            ]
        )
    return "\n\n".join([table(header, lines), *_edges(known)])


def draw(content: Content, path: Path) -> None:
    """Test accuracy against trained numbers, a panel per task, as PNG or SVG by the name of `path`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    known = cells(content)
    figure = Figure(figsize=(4.6 * len(content["tasks"]), 4.4))
    panels = figure.subplots(1, len(content["tasks"]), squeeze=False)[0]
    for axis, (task, facts) in zip(panels, content["tasks"].items(), strict=True):
        axis.axhline(100 * facts["converged_head"]["accuracy"], color="grey", ls=":", label="converged head alone")
        for number, (name, row) in enumerate(known.items()):
            size = content["methods"].get(name, {}).get("parameters")
            if size and task in row and row[task].accuracy:
                values = [100 * value for value in row[task].accuracy.values()]
                style = {"marker": "o" if name == ANCHOR else "osD^vP*Xh<>"[number % 11], "color": f"C{number % 10}"}
                axis.errorbar(size, statistics.fmean(values), spread(values), label=name, capsize=3, ls="", **style)
        axis.set(xscale="log", xlabel="trained numbers of the adapter", title=task)
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=120)
    partial.replace(path)


def _plain(content: Content, tasks: list[str], read: Any) -> list[str]:
    return [f"{100 * read(content['tasks'][task]):.1f}" for task in tasks]


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _accuracy(cell: Cell | None, seeds: int) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    if cell is None or not cell.accuracy:
        return "–"
    values = [100 * value for value in cell.accuracy.values()]
    deviation = spread(values)
    text = f"{statistics.fmean(values):.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds} seeds)"


def _difference(entry: Mapping[str, Any] | None, tasks: int) -> str:
    """Mean difference over tasks ± its standard error over test rows, in points."""
    if entry is None:
        return "–"
    text = f"{100 * entry['mean']:+.1f} ± {100 * entry['rows_error']:.1f}"
    return text if entry["tasks"] == tasks else f"{text} ({entry['tasks']} of {tasks} tasks)"


def _speed(content: Content, name: str) -> list[str]:
    """Median milliseconds of a step, its spread and its ratio to LoRA-XS; and MiB above the frozen forward pass."""
    found = content.get("speed", {}).get("methods", {}).get(name)
    if found is None:
        return ["–", "–"]
    middle, low, high = (f"{1e-3 * found['step'][key]:.0f}" for key in ("median_us", "p10_us", "p90_us"))
    over = "" if found["over_loraxs"] is None else f", {found['over_loraxs']:.2f}×"
    return [f"{middle} ({low}–{high}){over}", f"{statistics.median(found['peak_bytes']) / 2**20:.0f}"]


def _edges(known: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """A sentence on the cells whose best learning rate was the smallest or the largest one tried."""
    all_cells = [(f"{name} on {task}", cell) for name, row in known.items() for task, cell in row.items() if cell.rate]
    edges = [f"{where} ({cell.rate:g})" for where, cell in all_cells if cell.on_edge]
    if not edges:
        return []
    return [
        f"Best learning rate at the edge of its grid in {len(edges)} of {len(all_cells)} cells: {', '.join(edges)}."
    ]
