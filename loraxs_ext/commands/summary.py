"""What `loraxs init` reports: one line a module, totals, and a plot of the spectra."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COLUMNS = ("module", "shape", "rank", "energy", "error", "seconds")


@dataclass(frozen=True)
class ModuleBasis:
    """What is known of one prepared basis.

    Attributes:
        name: of the module.
        shape: (N, K).
        rank: of the basis.
        energy: share of ‖W‖² in the chosen singular directions, Σ σ² / ‖W‖².
        subspace_error: estimated sine of the largest angle to the true singular subspace.
        seconds: reading, hashing and decomposing it, or reading it from the cache; an equal share of its batch.
        singular_values: the chosen ones.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    energy: float
    subspace_error: float
    seconds: float
    singular_values: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the spectrum."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rank": self.rank,
            "energy": self.energy,
            "subspace_error": self.subspace_error,
            "seconds": self.seconds,
        }


def as_text(modules: Sequence[ModuleBasis], tol: float) -> str:
    """A table, and what it adds up to."""
    rows = [
        (
            m.name,
            f"{m.shape[0]}×{m.shape[1]}",
            str(m.rank),
            f"{m.energy:.1%}",
            f"{m.subspace_error:.1e}{' !' if m.subspace_error > tol else ''}",
            f"{m.seconds:.3f}",
        )
        for m in modules
    ]
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]

    def line(row: Sequence[str]) -> str:
        numbers = "  ".join(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        return f"{row[0].ljust(widths[0])}  {numbers}".rstrip()

    missed = [m for m in modules if m.subspace_error > tol]
    lines = [line(_COLUMNS), *map(line, rows)]
    if missed:
        lines.append(
            f"! {len(missed)} of {len(modules)} modules miss the subspace tolerance {tol:.1e}: their rank cuts through "
            f"a cluster of singular values, or --max-iter is too small. Their bases are usable and stay as they are."
        )
    return "\n".join(lines)


def needs_matplotlib() -> str | None:
    """What to do where plots cannot be made; None where they can."""
    if importlib.util.find_spec("matplotlib") is None:
        return 'plots need matplotlib: pip install "loraxs-ext[demo]"'
    return None


def plot(modules: Sequence[ModuleBasis], path: Path, title: str) -> None:
    """Draw σ_i/σ_1 over i, one panel per kind of module (the last part of its name), one line per module.

    Args:
        modules: with their spectra.
        path: of the image; its ending says which format.
        title: above all panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, list[ModuleBasis]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module.name), []).append(module)
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (kind, members) in zip(panels, kinds.items(), strict=False):
        for i, module in enumerate(members):
            largest = max(module.singular_values) or 1.0
            shade = i / max(1, len(members) - 1)
            values = [value / largest for value in module.singular_values]
            panel.plot(range(1, module.rank + 1), values, color=(0.1, 0.2 + 0.5 * shade, 0.8 - 0.5 * shade), lw=0.9)
        panel.set_title(kind, fontsize=9)
        panel.set_yscale("log")
        panel.tick_params(which="both", labelsize=7)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    figure.supxlabel("i", fontsize=9)
    figure.supylabel("σᵢ / σ₁ (from the first layer, blue, to the last, green)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def kind_of(name: str) -> str:
    """The name without its layer number: what stands behind it."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers and numbers[-1] + 1 < len(parts) else name
