"""Advice for people and for programs: a table, an explanation in plain language, JSON-ready values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .advice import Advice, Choice
from .patterns import snippet


def shown_ranks(advice: Advice) -> list[int]:
    """A few ranks to show the captured energy at: powers of four, and the largest that was measured."""
    most = max(module.rank_max for module in advice.modules)
    return [*(rank for rank in (1, 4, 16, 64, 256) if rank < most), most]


def table(advice: Advice) -> str:
    """A line per module: shape, captured energy at some ranks, the uniform rank, and the advised one."""
    ranks = shown_ranks(advice)
    header = ["module", "shape", *(f"r={rank}" for rank in ranks), "gain", "uniform", "advised"]
    total = sum(module.gained()[advice.uniform[module.name]] for module in advice.modules) or 1.0
    rows = []
    for module in advice.modules:
        captured = module.captured()
        shares = ["–" if captured is None or rank > module.rank_max else f"{captured[rank - 1]:.2%}" for rank in ranks]
        rank = advice.uniform[module.name]
        N, K = module.shape
        gain = f"{module.gained()[rank] / total:.1%}"
        rows.append([module.name, f"{N}×{K}", *shares, gain, str(rank), str(advice.advised[module.name])])
    totals = [str(_cost(advice, which)) for which in ("uniform", "advised")]
    rows.append(["parameters", *[""] * (len(header) - 3), *totals])
    return _columns([header, *rows])


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        rest = "  ".join(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        return f"{row[0].ljust(widths[0])}  {rest}".rstrip()

    return "\n".join(line(row) for row in rows)


def _cost(advice: Advice, which: Choice) -> int:
    return sum(rank**2 for rank in (advice.uniform if which == "uniform" else advice.advised).values())


def explain(advice: Advice) -> str:
    """What was measured, what is advised, and how sure that is."""
    first, second = advice.promise
    skipped = sum(rank == 0 for rank in advice.advised.values())
    left_out = f", {skipped} of {len(advice.modules)} modules are left alone" if skipped else ""
    measured = (
        "Measured: the gradient of the calibration loss at the frozen model. The columns r=… give the share of a "
        "module's whole gradient, squared, that its first r singular directions can express. An adapter moves fast in "
        "a direction of large singular value, so what counts for the budget is each direction weighted with the square "
        'of its gain; "gain" is a module\'s part of that sum at the uniform rank.'
    )
    ranks = [rank for rank in advice.advised.values() if rank]
    found = (
        f"Found: of all ranks within {advice.budget:,} parameters, those in the column “advised” ({min(ranks)} to "
        f"{max(ranks)}{left_out}) hold the most of it."
    )
    if advice.uniform_config is None:
        return "\n".join([measured, found, _TOO_SMALL.format(modules=len(advice.modules))])
    sure = (
        f"How sure: chosen on one half of the calibration data and measured on the other, they hold {first:+.0%} and "
        f"{second:+.0%} against the uniform ranks."
    )
    if not advice.stands_out:
        sure += " That is no more than the halves differ, so the difference may be chance."
    return "\n".join([measured, found, f"{sure} {_EVIDENCE}", _VERDICT[advice.recommended]])


_EVIDENCE = (
    "Either way it speaks of the start of training: on three real tasks, ranks that held about twice the sum "
    "did not reliably train better than uniform ones."
)
_TOO_SMALL = (
    "Advice: take the advised ranks: the budget is less than one parameter for each of the {modules} modules, so that "
    "no rank for all fits into it."
)
_VERDICT: dict[Choice, str] = {
    "uniform": "Advice: keep uniform. To try the advised ranks, compare both on held-out data, over several seeds.",
    "advised": "Advice: take the advised ranks, and compare them with the uniform ones on held-out data.",
}


def to_dict(advice: Advice, choice: Choice) -> dict[str, Any]:
    """JSON-ready: "config" holds arguments of LoraXSConfig for the choice, the rest is what it rests on."""
    configs = {"uniform": advice.uniform_config, "advised": advice.advised_config}
    chosen = configs[choice]
    if chosen is None:
        raise ValueError(f"ranks: expected 'advised', as no uniform rank fits into {advice.budget}, got {choice!r}")
    return {
        "config": snippet(chosen),
        "choice": choice,
        "recommended": advice.recommended,
        "budget": advice.budget,
        "promise": list(advice.promise),
        "explanation": explain(advice),
        **{name: None if config is None else snippet(config) for name, config in configs.items()},
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "captured": module.captured(),
                "gained": module.gained()[1:],
                "uniform": advice.uniform[module.name],
                "advised": advice.advised[module.name],
            }
            for module in advice.modules
        ],
    }
