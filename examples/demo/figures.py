"""The report's figures: matplotlib, handed out as SVG that takes text colour and font from the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Stands for "the page's text colour": replaced by currentColor in the SVG, so that one figure serves light and dark.
_INK = "#010203"
GREY, BLUE, ORANGE, GREEN, PURPLE, RED = "#8b93a1", "#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)

_STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def accuracy(
    tasks: Sequence[str], methods: Mapping[str, Sequence[tuple[float, float]]], majority: Sequence[float]
) -> str:
    """Test accuracy with standard errors; methods: name -> (accuracy, error) a task; majority: a line a task."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(8, 3.6))
        width = 0.8 / len(methods)
        for position, (name, values) in enumerate(methods.items()):
            places = [task + (position - (len(methods) - 1) / 2) * width for task in range(len(tasks))]
            heights = [100 * value for value, _ in values]
            errors = [100 * error for _, error in values]
            colour = (GREY, BLUE, ORANGE, GREEN)[position]
            axes.bar(places, heights, width * 0.92, yerr=errors, capsize=3, color=colour, ecolor=_INK, label=name)
            for place, height, error in zip(places, heights, errors, strict=True):
                axes.text(place, height + error + 0.8, f"{height:.1f}", ha="center", fontsize=10)
        for task, value in enumerate(majority):
            axes.hlines(100 * value, task - 0.45, task + 0.45, color=RED, linestyle=":", linewidth=1.5)
        axes.plot([], [], color=RED, linestyle=":", label="most frequent class")
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_ylabel("right answers on test text, %")
        axes.set_ylim(0, 108)
        axes.grid(axis="x", visible=False)
        axes.legend(ncols=len(methods) + 1, loc="upper center", bbox_to_anchor=(0.5, 1.16))
        return _svg(figure, "accuracy")


def curves(losses: Mapping[str, Sequence[float]], dev: Mapping[str, Sequence[float]]) -> str:
    """Smoothed training loss by step, and dev accuracy after each epoch, a line a task."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
        for colour, (name, loss) in zip(SERIES, losses.items(), strict=False):
            left.plot(range(1, len(loss) + 1), _smooth(loss), color=colour, label=name)
        left.set_xlabel("training step")
        left.set_ylabel("training loss (smoothed)")
        left.legend()
        for colour, values in zip(SERIES, dev.values(), strict=False):
            right.plot(range(1, len(values) + 1), [100 * v for v in values], "o-", color=colour)
        right.set_xlabel("epoch")
        right.set_ylabel("right answers on dev text, %")
        right.xaxis.get_major_locator().set_params(integer=True)
        figure.tight_layout()
        return _svg(figure, "curves")


def spectra(values: Mapping[str, Sequence[float]], rank: int) -> str:
    """Singular values of every matrix relative to its largest, coloured by the matrix's role; a line at ``rank``."""
    roles = list(dict.fromkeys(_role(name) for name in values))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(8, 3.4))
        for name, spectrum in values.items():
            shares = [value / spectrum[0] for value in spectrum]
            axes.plot(range(1, len(shares) + 1), shares, color=SERIES[roles.index(_role(name))], alpha=0.6, linewidth=1)
        for role in roles:
            axes.plot([], [], color=SERIES[roles.index(role)], label=role)
        axes.axvline(rank, color=_INK, linestyle="--", linewidth=1)
        axes.text(rank * 1.06, 1.08, f"r = {rank}", fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1e-2, 1.6)
        axes.set_xlabel("singular value, number")
        axes.set_ylabel("size relative to the largest")
        axes.legend(ncols=2, loc="lower left", fontsize=10)
        return _svg(figure, "spectra")


def sizes(bars: Mapping[str, tuple[int, str]], rank: int) -> str:
    """Left: measured bytes, name -> (bytes, colour). Right: bytes of one adapted square layer against its width."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), width_ratios=(1.35, 1))
        names = list(bars)[::-1]
        left.barh(names, [bars[name][0] for name in names], color=[bars[name][1] for name in names])
        for row, name in enumerate(names):
            left.text(bars[name][0] * 1.15, row, human_bytes(bars[name][0]), va="center", fontsize=10)
        left.set_xscale("log")
        left.set_xlim(right=max(size for size, _ in bars.values()) * 14)
        left.set_xlabel("bytes on disk")
        left.grid(axis="y", visible=False)
        widths = [2**power for power in range(8, 15)]
        right.plot(widths, [4 * 2 * width * rank for width in widths], "o-", color=ORANGE, label=f"LoRA r = {rank}")
        right.plot(widths, [4 * rank * rank for _ in widths], "o-", color=BLUE, label=f"LoRA-XS r = {rank}")
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.set_xlabel("width of the layer")
        right.set_ylabel("bytes a layer, fp32")
        right.legend(loc="center", bbox_to_anchor=(0.5, 0.23))
        figure.tight_layout()
        return _svg(figure, "sizes")


def human_bytes(count: int) -> str:
    """``count`` as "123 B", "12.3 kB" or "12.3 MB"."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def _role(module: str) -> str:
    """What a BERT linear layer does, from its name."""
    if module.endswith("attention.output.dense"):
        return "attention output"
    return {"intermediate": "MLP up", "output": "MLP down"}.get(module.split(".")[-2], module.split(".")[-1])


def _smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(average / weight)
    return result


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an <svg> element whose ids don't meet those of another figure on the page."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata=nothing)
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{salt}-")
    return text
