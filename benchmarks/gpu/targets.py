"""What was promised, and whether the measured rows keep it: true, false, or null where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.cells import plan
from benchmarks.gpu.peers import GATHERED
from benchmarks.gpu.providers import BASE, LORAXS, OURS

Row = Mapping[str, Any]

# What the dispatcher chose first, then every owner by name.
LORAXS_PROVIDERS = tuple(name for name in LORAXS if name.startswith(OURS))


class Target(NamedTuple):
    """At most `limit` for `figure(row, provider)` in every cell that `applies`; None where a row cannot tell."""

    name: str
    limit: float
    applies: Callable[[Row], bool]
    figure: Callable[[Row, str], float | None]
    candidates: tuple[str, ...] = LORAXS_PROVIDERS


def _over_base(row: Row, provider: str) -> float | None:
    return row["ratio"].get(provider) if row["base"] == BASE else None


def _over_gathered(row: Row, provider: str) -> float | None:
    """Over the fastest gathered LoRA of the row, by medians."""
    times = row["times"]
    gathered = [times[name]["median_us"] for name in GATHERED if name in times]
    return times[provider]["median_us"] / min(gathered) if gathered and provider in times else None


TARGETS = (
    Target(
        "decode, r = 16, M <= 64, every row its own adapter, over F.linear",
        1.05,
        lambda row: row["kind"] == "decode" and row["r"] == 16 and row["M"] <= 64,
        _over_base,
    ),
    Target(
        "decode, r = 64, M <= 64, every row its own adapter, over F.linear",
        1.10,
        lambda row: row["kind"] == "decode" and row["r"] == 64 and row["M"] <= 64,
        _over_base,
    ),
    Target(
        "prefill, r = 16, M = 4096, over F.linear",
        1.03,
        lambda row: row["kind"] == "prefill" and row["r"] == 16 and row["M"] == 4096,
        _over_base,
    ),
    Target(
        "prefill, r = 64, M = 4096, over F.linear",
        1.06,
        lambda row: row["kind"] == "prefill" and row["r"] == 64 and row["M"] == 4096,
        _over_base,
    ),
    Target(
        "forward + backward, r = 16, M = 4096, over frozen forward + dX",
        1.08,
        lambda row: row["kind"] == "training" and row["r"] == 16 and row["M"] == 4096,
        _over_base,
    ),
    Target(
        "EDoRA's row scale, M = 4096, over LoRA-XS",
        1.02,
        lambda row: row["kind"] == "edora" and row["M"] == 4096,
        lambda row, provider: row["ratio"].get(provider),
        ("loraxs + row scale",),
    ),
    Target(
        "64 distinct adapters, over the fastest gathered LoRA",
        1.0,
        lambda row: row["kind"] == "decode" and row["M"] == 64,
        _over_gathered,
    ),
)


# Time over that of the base model, or of adapters that stay; for tokens per second of at least 0.95.
SERVING_TARGETS = {"decode step": 1 / 0.95, "Zipf trace": 1 / 0.95}


def judge(rows: Sequence[Row], memory: Row | None, serving: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """Every target with its worst figure and where, for what the dispatcher chose and for every owner called directly.

    `met` speaks of what the dispatcher chose; it is null until every cell the target names has a figure.
    """
    verdicts = [_judge(target, rows) for target in TARGETS]
    verdicts += [_judge_serving(what, limit, serving) for what, limit in SERVING_TARGETS.items()]
    saved = None if memory is None else memory["saved_bytes"][OURS]
    wanted = None if memory is None else memory["expected_bytes"]
    verdicts.append(
        {
            "target": "bytes saved for backward: M * r numbers in fp32",
            "limit": wanted,
            "worst": saved,
            "met": None if saved is None else saved <= wanted,
        }
    )
    return verdicts


def _judge_serving(what: str, limit: float, serving: Sequence[Row]) -> dict[str, Any]:
    slowest = max((1 / row["ratio"] for row in serving if row["what"] == what), default=None)
    met = None if slowest is None else slowest <= limit
    return {"target": f"a decoder, {what}, time over the base", "limit": limit, "worst": slowest, "met": met}


def _judge(target: Target, rows: Sequence[Row]) -> dict[str, Any]:
    wanted = sum(target.applies(cell.to_dict()) for cell in plan())
    by_owner = {}
    for provider in target.candidates:
        found = [(target.figure(row, provider), row) for row in rows if target.applies(row)]
        known = [(figure, row) for figure, row in found if figure is not None]
        if not known:
            continue
        worst, where = max(known, key=lambda pair: pair[0])
        late = worst > target.limit
        by_owner[provider] = {
            "worst": worst,
            "worst_cell": f"M{where['M']} {where['K']}->{where['N']} r{where['r']}",
            "cells": len(known),
            "met": False if late else True if len(known) == wanted else None,
        }
    chosen = by_owner.get(target.candidates[0], {"worst": None, "met": None})
    return {
        "target": target.name,
        "limit": target.limit,
        "worst": chosen["worst"],
        "met": chosen["met"],
        "cells_wanted": wanted,
        "by_owner": by_owner,
    }
