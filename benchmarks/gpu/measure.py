"""One cell: every provider checked against fp64, then timed in alternation, with its share of the physical limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from benchmarks._measure import alternate, ratio, summary
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.check import assert_right, poison_allocator
from benchmarks.gpu.clock import Clock, Timed
from benchmarks.gpu.data import make_inputs, make_layer
from benchmarks.gpu.limits import Ceilings
from benchmarks.gpu.owners import NotBuilt
from benchmarks.gpu.peers import GATHERED, PEERS
from benchmarks.gpu.providers import BASE, LORAXS, OURS, Factory, Provider, Refused
from benchmarks.gpu.sites import EDORA, STACKED


def providers_of(cell: Cell) -> Mapping[str, Factory]:
    """Who competes in this kind of cell; the first is what ratios refer to."""
    if cell.kind == "stacked":
        return STACKED
    if cell.kind == "edora":
        return {OURS: LORAXS[OURS], **EDORA, BASE: LORAXS[BASE]}
    return {**LORAXS, **PEERS, **(GATHERED if cell.kind in ("decode", "prefill") else {})}


def measure(
    cell: Cell,
    clock: Clock,
    ceilings: Ceilings,
    device: torch.device,
    *,
    seconds: float,
    excluded: Collection[str] = (),
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """The row of one cell.

    Args:
        seconds: time for the alternation of all providers.
        excluded: "kind:provider" of those that broke the device before.
        begin: told the name of a provider before it first runs.

    Returns:
        the cell with `errors`, `times`, `ratio` to the first provider in the same round, `share_of_limit`, and
        `refused` and `failed`: why a provider has no figure.

    Raises:
        Exception: a provider broke the device; this process can do nothing more with it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(cell.M * 31 + cell.N * 7 + cell.K + cell.r)
    inputs = make_inputs(cell, device)
    layers = [make_layer(cell, device) for _ in range(cell.weight_sets)]
    names = providers_of(cell)
    row: dict[str, Any] = {**cell.to_dict(), "base": next(iter(names)), "errors": {}, "refused": {}, "failed": {}}
    timed: dict[str, Timed] = {}
    limits: dict[str, float] = {}
    for name, factory in names.items():
        if f"{cell.kind}:{name}" in excluded:
            row["failed"][name] = "it broke the device in an earlier cell of this kind"
            continue
        begin(name)
        try:
            calls: list[Provider] = [factory(cell, layer, inputs) for layer in layers]
            prepared = clock.record(calls, graph=not cell.backward)
            row["errors"][name] = check(calls[-1], prepared, device)
        except (Refused, NotBuilt) as error:
            row["refused"][name] = str(error)
            continue
        except Exception as error:
            if not _alive(device):
                raise
            row["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        timed[name] = prepared
        limits[name] = calls[0].work.seconds(ceilings)
    begin("timing")
    runs = {name: entry.run for name, entry in timed.items()}
    samples = alternate(runs, seconds, clock.seconds) if runs else {}
    each = {name: [sample / len(layers) for sample in own] for name, own in samples.items()}
    row["clock"] = "CUDA graph" if not cell.backward else "events around eager calls"
    row["times"] = {name: summary(own) for name, own in each.items()}
    base = row["base"]
    row["ratio"] = {name: ratio(each, name, base) for name in each if base in each and name != base}
    row["share_of_limit"] = {name: limits[name] / statistics.median(own) for name, own in each.items()}
    return row


def _alive(device: torch.device) -> bool:
    """Whether the device still computes: an illegal access ends everything, an unsuitable launch nothing."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except RuntimeError:
        return False


def check(last: Provider, prepared: Timed, device: torch.device) -> dict[str, dict[str, float]]:
    """What the timed call of the last set of weights wrote, against fp64."""
    exact, plain = last.plain(torch.float64), last.plain(last.inputs.x.dtype)
    poison_allocator(device)
    return assert_right(prepared.outputs(), plain, exact)
