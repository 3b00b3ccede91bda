"""The figures of `report`: time over that of the base against tokens, one figure per rank, one panel per shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402

COLUMNS = 3


def draw(rows: Sequence[Mapping[str, Any]], title: str, caption: str) -> Figure | None:
    """A figure of all rows that have ratios and tokens; None if there are none.

    Args:
        rows: with `ratio` by provider, M, r, and what tells panels apart.
        title: above the panels.
        caption: under the title: device, date and commit.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("ratio") and "M" in row:
            panels.setdefault(_panel(row), []).append(row)
    if not panels:
        return None
    height = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3.4 * height + 1))
    axes = figure.subplots(height, COLUMNS, squeeze=False)
    providers = list(dict.fromkeys(name for row in rows for name in row.get("ratio") or {}))
    for (name, some), axis in zip(panels.items(), axes.flat, strict=False):
        ordered = sorted(some, key=lambda row: row["M"])
        for number, provider in enumerate(providers):
            points = [(row["M"], row["ratio"][provider]) for row in ordered if provider in row["ratio"]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{number}", label=provider)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=name, xscale="log", xlabel="tokens", ylabel="time / base")
        axis.title.set_fontsize(9)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles = {
        label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(f"{title}\n{caption}", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.set_layout_engine("constrained")
    return figure


def _panel(row: Mapping[str, Any]) -> str:
    kind = row.get("kind") or ("forward + backward" if row.get("backward") else "forward")
    shape = f"{row['K']} → {row['N']}" if "N" in row else f"width {row['width']}"
    return f"{kind}, {row['dtype']}, {shape}"
