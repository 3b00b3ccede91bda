"""Requests for many adapters, few of them often: as many slots as a server has, against a slot for each of them.

Waves of concurrent requests: while one is generated, the adapters of the next are prefetched. (A server that batches
continuously mixes the waves; the adapters come and go in the same way.)
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.serve.loop import TIE, WrongTokens, sample, shortfall, timed_generate
from benchmarks.serve.workload import Batch, RandomAdapters, Workload
from loraxs_ext.serve import AdapterPool
from loraxs_ext.store import AdapterStore

EXPONENT = 1.0
# Waves that only go through the slots before the first leg, so that these hold what a server's would.
EARLIER = 50


class Trace(NamedTuple):
    """How much is asked for.

    Attributes:
        dtype: of the model.
        adapters: that requests are for, the k-th most popular with probability ∝ 1/k.
        slots: of the pool.
        wave: requests at a time.
        waves: of one leg; each leg is served both ways, and timed as a whole.
        legs: how many.
        prompt, new: tokens of a request, at most, and to generate.
    """

    dtype: torch.dtype
    adapters: int
    slots: int
    wave: int
    waves: int
    legs: int
    prompt: int
    new: int


FULL = Trace(torch.bfloat16, 100_000, 256, 64, 6, 5, 16, 16)
TINY = Trace(torch.float32, 40, 8, 4, 3, 2, 6, 4)


def draw(trace: Trace, adapters: RandomAdapters, waves: int) -> list[list[str]]:
    """Names of the adapters of each wave. Who is popular has nothing to do with the order of the names."""
    source = random.Random(0)
    by_rank = source.sample(range(trace.adapters), trace.adapters)
    weights = list(accumulate(1 / k**EXPONENT for k in range(1, trace.adapters + 1)))
    picked = source.choices(by_rank, cum_weights=weights, k=waves * trace.wave)
    return [[adapters.name(i) for i in picked[w * trace.wave : (w + 1) * trace.wave]] for w in range(waves)]


def serve(pool: AdapterPool, waves: Sequence[Sequence[str]], batch: Batch, new: int) -> tuple[float, list[Tensor]]:
    """Seconds for all waves, and the tokens of each."""
    found = []
    start = time.perf_counter()
    for number, names in enumerate(waves):
        with pool.adapters(names):
            if number + 1 < len(waves):
                pool.prefetch(waves[number + 1])
            found.append(timed_generate(pool.model, batch, new, nullcontext).tokens)
    return time.perf_counter() - start, found


def measure(workload: Workload, trace: Trace, store: AdapterStore, adapters: RandomAdapters) -> dict[str, Any]:
    """One row: tokens per second with few slots, and with a slot for every adapter of the trace.

    Raises:
        WrongTokens: both ways don't give the same tokens, or a row is not what it is alone.
    """
    earlier, *legs = portions(draw(trace, adapters, EARLIER + trace.legs * trace.waves), trace)
    distinct = sorted({name for leg in legs for names in leg for name in names})
    batch = workload.prompts(trace.wave, trace.prompt)
    paged_model, resident_model = workload.load(trace.dtype), workload.load(trace.dtype)
    seconds: dict[str, list[float]] = {"paged": [], "resident": []}
    with (
        AdapterPool(paged_model, store, slots=trace.slots) as paged,
        AdapterPool(resident_model, store, slots=len(distinct)) as resident,
    ):
        resident.pin(distinct)
        for names in earlier:
            paged.acquire(names).release()
        # The first call of a model prepares its kernels.
        serve(paged, earlier[-1:], batch, 2)
        serve(resident, legs[0][:1], batch, 2)
        before = paged.stats()
        for number, waves in enumerate(legs):
            tokens = {}
            for name, pool in (("paged", paged), ("resident", resident))[:: 1 if number % 2 == 0 else -1]:
                elapsed, tokens[name] = serve(pool, waves, batch, trace.new)
                seconds[name].append(elapsed)
            if not all(map(torch.equal, tokens["paged"], tokens["resident"])):
                raise WrongTokens("the trace: a slot that was filled on the way gives other tokens than one that stays")
        after = paged.stats()
        missed = _missed(paged, legs[-1][-1], batch, tokens["paged"][-1])
        if missed > TIE[trace.dtype]:
            raise WrongTokens(f"the trace: a row misses its own tokens by {missed:.3f}, allowed {TIE[trace.dtype]}")
    counts = {name: after[name] - before[name] for name in before}
    asked = sum(len(set(names)) for leg in legs for names in leg)
    requests = trace.legs * trace.waves * trace.wave
    per_leg = requests // trace.legs * trace.new
    ratios = sorted(b / a for a, b in zip(seconds["paged"], seconds["resident"], strict=True))
    return {
        "section": "zipf",
        "dtype": str(trace.dtype).removeprefix("torch."),
        "exponent": EXPONENT,
        "adapters": trace.adapters,
        "slots": trace.slots,
        "in_flight": trace.wave,
        "requests": requests,
        "distinct": len(distinct),
        "prompt_tokens": int(batch.mask.sum()) / trace.wave,
        "new_tokens": trace.new,
        "batching": "waves",
        "tokens_per_second": {name: per_leg / statistics.median(some) for name, some in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "failed_requests": counts["failures"] + counts["timeouts"],
        "loads": counts["loads"],
        "load_ms": 1e3 * counts["load_seconds"] / max(1, counts["loads"]),
        "evictions": counts["evictions"],
        "waits": counts["waits"],
        "wait_seconds": counts["wait_seconds"],
        # Of the distinct adapters of each wave.
        "resident_before_prefetch": 1 - counts["loads"] / asked,
        "resident_when_asked_for": counts["hits"] / (counts["hits"] + counts["misses"]),
        "checked": {"own_adapter_misses_by": missed, "waves_equal": trace.legs * trace.waves},
    }


def portions(waves: list[list[str]], trace: Trace) -> list[list[list[str]]]:
    """What was asked for earlier, then the legs."""
    legs = range(EARLIER, len(waves), trace.waves)
    return [waves[:EARLIER], *(waves[first : first + trace.waves] for first in legs)]


def _missed(pool: AdapterPool, names: Sequence[str], batch: Batch, tokens: Tensor) -> float:
    model: Any = pool.model
    return max(shortfall(model, batch, i, tokens, partial(pool.adapters, [names[i]])) for i in sample(len(names)))
