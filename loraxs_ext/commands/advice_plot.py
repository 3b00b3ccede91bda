"""A figure of the advice: captured energy over the rank, and the ranks themselves."""

from __future__ import annotations

import math
from pathlib import Path

from loraxs_ext.advisor import Advice, ModuleGradient

from .summary import kind_of


def plot(advice: Advice, path: Path, title: str) -> None:
    """Draw captured energy over rank, a panel per kind of module, and below them both allocations as bars.

    Args:
        advice: what to draw.
        path: of the image; its ending says which format.
        title: above all panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the ending.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, list[ModuleGradient]] = {}
    for module in advice.modules:
        kinds.setdefault(kind_of(module.name), []).append(module)
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.2 * max(columns, 2), 2.4 * rows + 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.4 * rows, 2.8])[:, 0]
    panels = above.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, (kind, members) in zip(panels, kinds.items(), strict=False):
        for i, module in enumerate(members):
            shade = i / max(1, len(members) - 1)
            captured = module.captured() or []
            panel.plot(range(1, len(captured) + 1), captured, color=(0.1, 0.2 + 0.5 * shade, 0.8 - 0.5 * shade), lw=0.9)
        panel.set_title(kind, fontsize=8)
        panel.tick_params(labelsize=7)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    above.supxlabel("rank", fontsize=8)
    above.supylabel("‖UᵀGV‖² / ‖G‖²", fontsize=8)
    bars = below.subplots()
    places = range(len(advice.modules))
    bars.bar(places, list(advice.advised.values()), color="tab:blue", label="advised")
    bars.step(places, list(advice.uniform.values()), where="mid", color="tab:orange", label="uniform")
    bars.set_xlabel("module, in the order of the model", fontsize=8)
    bars.set_ylabel("rank", fontsize=8)
    bars.tick_params(labelsize=7)
    bars.legend(fontsize=7)
    figure.suptitle(f"{title} (first layer blue, last green)", fontsize=9)
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=120)
    partial.replace(path)
