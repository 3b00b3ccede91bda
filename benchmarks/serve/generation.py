"""Tokens per second where every row of a batch has its own adapter, over those of the base model alone."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.serve.catalogue import make_store
from benchmarks.serve.loop import TIE, Context, Run, WrongTokens, sample, shortfall, timed_generate
from benchmarks.serve.peers import PeftLora
from benchmarks.serve.workload import Batch, RandomAdapters, Workload, manifest_of, targets
from loraxs_ext.serve import AdapterPool

BASE, LORAXS, PEFT = "base model", "loraxs", "PEFT LoRA"


class Cell(NamedTuple):
    """One row of the result.

    Attributes:
        dtype: of the model.
        adapters: rows of the batch, each with an adapter of its own.
        prompt: tokens of a prompt, at most.
        new: tokens to generate.
        rounds: how often each side is called.
        peer_new: tokens to generate where PEFT takes part; 0 to leave it out.
    """

    dtype: torch.dtype
    adapters: int
    prompt: int
    new: int
    rounds: int
    peer_new: int = 0


FULL = (
    Cell(torch.float32, 1, 32, 32, 5),
    Cell(torch.float32, 8, 32, 32, 5),
    Cell(torch.float32, 64, 16, 12, 4),
    Cell(torch.bfloat16, 1, 32, 32, 7, 16),
    Cell(torch.bfloat16, 8, 32, 32, 7, 8),
    Cell(torch.bfloat16, 64, 32, 24, 5, 4),
    Cell(torch.bfloat16, 1000, 4, 6, 7),
)
TINY = (Cell(torch.float32, 1, 6, 4, 2, 3), Cell(torch.float32, 5, 6, 4, 2, 3))
PEFT_AT_MOST = 64
# Why PEFT is left out of a batch of many.
NOT_RUN = "not run: it visits all adapters of a batch one by one in every module, {pairs:,} pairs of products a step"


def measure(workload: Workload, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """A row per cell, each checked before it is timed.

    Raises:
        WrongTokens: a row of a batch is not what it is alone.
    """
    for dtype in dict.fromkeys(cell.dtype for cell in cells):
        some = [cell for cell in cells if cell.dtype == dtype]
        for cell in some:
            if cell.peer_new:
                yield _measure_peer(cell, workload)
            elif cell.adapters > PEFT_AT_MOST:
                reason = NOT_RUN.format(pairs=cell.adapters * len(targets(workload.load(dtype))))
                yield {
                    "section": "generation",
                    "dtype": str(dtype).removeprefix("torch."),
                    "adapters": cell.adapters,
                    "provider": PEFT,
                    "not_run": reason,
                }
        base, served = workload.load(dtype), workload.load(dtype)
        adapters = RandomAdapters(list(targets(base)), max(cell.adapters for cell in some))
        with tempfile.TemporaryDirectory() as folder:
            store, _ = make_store(Path(folder) / "store", manifest_of(base), adapters)
            with store, AdapterPool(served, store, slots=adapters.count) as pool:
                for cell in some:
                    yield _measure(cell, workload.prompts(cell.adapters, cell.prompt), base, pool, adapters)


def _measure(
    cell: Cell, batch: Batch, base: PreTrainedModel, pool: AdapterPool, adapters: RandomAdapters
) -> dict[str, Any]:
    names = adapters.names(cell.adapters)
    served = pool.model
    checked = check(cell, batch, base, pool, names)
    sides: dict[str, Any] = {
        BASE: partial(timed_generate, base, batch, cell.new),
        LORAXS: partial(timed_generate, served, batch, cell.new, partial(pool.adapters, names)),
    }
    return {**_describe(cell, batch), **_figures(cell, alternate(sides, cell.rounds)), "checked": checked}


def check(cell: Cell, batch: Batch, base: PreTrainedModel, pool: AdapterPool, names: Sequence[str]) -> dict[str, float]:
    """How far tokens of the mixed batch are from those of each row alone, for some rows.

    Raises:
        WrongTokens: further than ties explain; or so close to those of another adapter that nothing was shown.
    """
    served: Any = pool.model
    tie = TIE[cell.dtype]

    def of(name: str | None) -> Context:
        return partial(pool.adapters, [name])

    tokens = timed_generate(served, batch, cell.new, partial(pool.adapters, names)).tokens
    rows = sample(cell.adapters)
    own = max(shortfall(served, batch, i, tokens, of(names[i])) for i in rows)
    others = statistics.median(shortfall(base, batch, i, tokens) for i in rows)
    if own > tie:
        raise WrongTokens(f"{cell.adapters} adapters: a row misses its own tokens by {own:.3f} logits, allowed {tie}")
    if others <= tie:
        raise WrongTokens(f"{cell.adapters} adapters: the base model alone has the same tokens within {others:.3f}")
    found = {"own_adapter_misses_by": own, "base_model_misses_by": others}
    # Every other row without adapter; their tokens are those of the model that never met a pool.
    holes = [None if i % 2 == 0 else name for i, name in enumerate(names)]
    tokens = timed_generate(served, batch, 2, partial(pool.adapters, holes)).tokens
    rows_alone = {
        i: shortfall(base, batch, i, tokens) if holes[i] is None else shortfall(served, batch, i, tokens, of(holes[i]))
        for i in rows
    }
    found["rows_without_adapter_miss_by"] = max(rows_alone.values())
    if found["rows_without_adapter_miss_by"] > tie:
        raise WrongTokens(f"{cell.adapters} rows, half of them without adapter: off by {rows_alone}, allowed {tie}")
    return found


def _measure_peer(cell: Cell, workload: Workload) -> dict[str, Any]:
    """PEFT's LoRA of the same rank on the same modules, `adapter_names` choosing one for each row."""
    cell = cell._replace(new=cell.peer_new, rounds=2)
    batch = workload.prompts(cell.adapters, cell.prompt)
    base = workload.load(cell.dtype)
    peer = PeftLora(workload.load(cell.dtype), cell.adapters)
    tokens = peer.generate(batch, cell.new).tokens
    missed = max(shortfall(peer.model, batch, i, tokens, partial(peer.alone, i)) for i in sample(cell.adapters))
    if missed > TIE[cell.dtype]:
        raise WrongTokens(f"PEFT: a row misses its own tokens by {missed:.3f} logits, allowed {TIE[cell.dtype]}")
    sides: dict[str, Any] = {
        BASE: partial(timed_generate, base, batch, cell.new),
        PEFT: partial(peer.generate, batch, cell.new),
    }
    checked = {"own_adapter_misses_by": missed}
    return {**_describe(cell, batch), **_figures(cell, alternate(sides, cell.rounds)), "checked": checked}


def alternate(sides: dict[str, Any], rounds: int) -> dict[str, list[Run]]:
    """Call every side once a round, each of them first equally often."""
    found: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(sides[name]())
    return found


def _describe(cell: Cell, batch: Batch) -> dict[str, Any]:
    return {
        "section": "generation",
        "dtype": str(cell.dtype).removeprefix("torch."),
        "adapters": cell.adapters,
        "prompt_tokens": int(batch.mask.sum()) / cell.adapters,
        "new_tokens": cell.new,
        "rounds": cell.rounds,
    }


def _figures(cell: Cell, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Tokens per second by the median call, and ratios within rounds of the second side to the first."""
    (_, base), (provider, other) = runs.items()
    ratios = sorted(b.total / o.total for b, o in zip(base, other, strict=True))
    return {
        "provider": provider,
        "tokens_per_second": {
            name: cell.adapters * cell.new / statistics.median(run.total for run in some) for name, some in runs.items()
        },
        "decode_tokens_per_second": {
            name: cell.adapters / statistics.median(run.step for run in some) for name, some in runs.items()
        },
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "decode_ratio": statistics.median(b.step / o.step for b, o in zip(base, other, strict=True)),
        "prefill_ratio": statistics.median(b.prefill / o.prefill for b, o in zip(base, other, strict=True)),
    }
