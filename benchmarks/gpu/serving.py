"""A decoder that serves many adapters on a GPU: graphs of a decode step, the way of one row to the device, a trace.

python -m benchmarks.gpu.serving              prints the rows
python -m benchmarks.gpu.serving --dry-run    walks the same code on a CPU with a tiny model; no figures

A decode step is captured once for the base model and once for the pool and then replayed: other adapters come to be
served by overwriting the slots that the graph reads. Weights are random, shared by both models.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks._measure import alternate
from benchmarks.gpu.clock import Clock, CpuClock, CudaClock, Timed, timed
from benchmarks.serve.workload import RandomAdapters, manifest_of, targets
from loraxs_ext.serve import AdapterPool
from loraxs_ext.store import Pager, Slab

KIND = "serving"
# Largest difference of a row's logits from those of the row among others, in units of the largest logit: rounding.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
# Of R. The top singular values of random weights stand out by little, and what they carry has to be seen.
STD = 3.0
BASE, LORAXS = "base model", "loraxs"


class Scale(NamedTuple):
    """How much of everything.

    Attributes:
        config: of the model.
        dtype: of its weights.
        rows: sizes of decode batches, every row its own adapter.
        context: tokens that every row attends to.
        attaches: how many single rows are brought to the device.
        adapters, slots, wave, waves, steps: of the trace: how many adapters requests are for, slots of the pool,
            requests at a time, waves, and tokens of a request.
    """

    config: LlamaConfig
    dtype: torch.dtype
    rows: tuple[int, ...]
    context: int
    attaches: int
    adapters: int
    slots: int
    wave: int
    waves: int
    steps: int


def full_scale() -> Scale:
    """Half the layers of an 8B model, in the shapes of Llama-3."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    return Scale(config, torch.bfloat16, (64, 1, 8, 1000), 256, 2000, 100_000, 256, 64, 40, 32)


def dry_scale() -> Scale:
    """Small enough for a CPU."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return Scale(config, torch.float32, (3, 1), 5, 20, 30, 6, 3, 4, 2)


class Wrong(Exception):
    """A row is not what it has to be; there is no figure for it."""


class Context:
    """Keys and values of tokens that were seen already; every step writes the last position anew, so it never ends.

    Stands in for a cache of transformers, whose counters would run on with every replay of a graph.
    """

    is_compileable = True

    def __init__(self, scale: Scale, rows: int, device: torch.device) -> None:
        heads = scale.config.num_key_value_heads
        width = scale.config.hidden_size // scale.config.num_attention_heads
        shape = (rows, heads, scale.context, width)
        self._tensors = [
            tuple(torch.randn(shape, device=device, dtype=scale.dtype) for _ in range(2))
            for _ in range(scale.config.num_hidden_layers)
        ]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, with those of this step at the end."""
        all_keys, all_values = self._tensors[layer_idx]
        all_keys[:, :, -1:] = keys
        all_values[:, :, -1:] = values
        return all_keys, all_values


class Step:
    """One decode step of `rows` rows, always at the same position."""

    def __init__(self, scale: Scale, rows: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(rows)
        self._ids = torch.randint(3, scale.config.vocab_size, (rows, 1), generator=generator).to(device)
        self._context = Context(scale, rows, device)
        self._mask = torch.zeros(1, 1, 1, scale.context, device=device, dtype=scale.dtype)
        self._position = torch.full((1, 1), scale.context - 1, device=device)

    def __call__(self, model: PreTrainedModel) -> tuple[Tensor]:
        """Logits [rows, vocabulary]."""
        found = model(
            input_ids=self._ids, attention_mask=self._mask, position_ids=self._position, use_cache=True,
            past_key_values=self._context,
        )  # fmt: skip
        return (found.logits[:, -1],)


@torch.no_grad()
def measure(
    device: torch.device,
    *,
    clock: Clock,
    dry: bool = False,
    seconds: float = 0.5,
    begin: Callable[[str], None] = lambda what: None,
) -> Iterator[dict[str, Any]]:
    """One row per batch size, then the attach and the trace, each checked before it is timed.

    Args:
        device: of the model.
        clock: times the steps.
        dry: a tiny model; the rows hold no figures.
        seconds: of alternation per batch size.
        begin: told what comes next.

    Raises:
        Wrong: a result is not what it has to be.
    """
    scale = dry_scale() if dry else full_scale()
    begin("model")
    base, served = _models(scale, device)
    manifest = manifest_of(base)
    adapters = RandomAdapters(list(targets(base)), max(scale.adapters, *scale.rows), std=STD, manifest=manifest)
    with AdapterPool(served, adapters, slots=max(scale.rows)) as pool:
        for rows in scale.rows:
            begin(f"decode {rows}")
            yield _without_figures(_decode(scale, rows, base, pool, adapters, clock, seconds), dry)
    begin("attach")
    yield _without_figures(_attach(scale, adapters, device), dry)
    begin("trace")
    with AdapterPool(served, adapters, slots=scale.slots) as pool:
        yield _without_figures(_trace(scale, pool, adapters, clock), dry)


def _models(scale: Scale, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice, with one set of weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(scale.dtype)
    try:
        with device:
            base = LlamaForCausalLM(scale.config)
            served = LlamaForCausalLM(scale.config)
    finally:
        torch.set_default_dtype(before)
    for mine, theirs in zip(base.parameters(), served.parameters(), strict=True):
        theirs.data = mine.data
    return base.eval().requires_grad_(False), served.eval().requires_grad_(False)


def _decode(
    scale: Scale,
    rows: int,
    base: PreTrainedModel,
    pool: AdapterPool,
    adapters: RandomAdapters,
    clock: Clock,
    seconds: float,
) -> dict[str, Any]:
    """A decode step of the pool over one of the base model."""
    model: Any = pool.model
    step = Step(scale, rows, pool.device)
    with pool.acquire(adapters.names(rows)) as lease:
        slots = torch.tensor(lease.slots, dtype=torch.int32, device=pool.device)
        buffer = pool.slot_buffer(rows)
        with pool.token_slots(buffer):
            plain = clock.record([lambda: step(base)], graph=True)
            mixed = clock.record([lambda: step(model)], graph=True)
            error = _check(plain, mixed, buffer, slots, TOLERANCE[scale.dtype])
            buffer.copy_(slots)
            samples = alternate({BASE: plain.run, LORAXS: mixed.run}, seconds, clock.seconds)
    medians = {name: statistics.median(some) for name, some in samples.items()}
    return {
        "kind": KIND,
        "what": "decode step",
        "adapters": rows,
        "context": scale.context,
        "layers": scale.config.num_hidden_layers,
        "dtype": str(scale.dtype).removeprefix("torch."),
        "error": error,
        "step_us": {name: 1e6 * median for name, median in medians.items()},
        "tokens_per_second": {name: rows / median for name, median in medians.items()},
        "ratio": statistics.median(b / o for b, o in zip(samples[BASE], samples[LORAXS], strict=True)),
    }


def _check(plain: Timed, mixed: Timed, buffer: Tensor, slots: Tensor, tolerance: float) -> float:
    """The largest error, as a share of the largest logit: rows without adapter against the base model, and rows among
    others against rows among their like. One recording serves them all."""
    (expected,) = (y.float().clone() for y in plain.outputs())

    def served(pattern: Tensor) -> Tensor:
        buffer.copy_(pattern)
        (y,) = mixed.outputs()
        return y.float().clone()

    unit = float(expected.abs().max())
    errors = [float((served(torch.full_like(slots, -1)) - expected).abs().max()) / unit]
    together = served(slots)
    if float((together - expected).abs().max()) / unit <= tolerance:
        raise Wrong("the adapters change nothing that could be seen")
    rows = len(slots)
    for i in sorted({0, rows // 2, rows - 1}):
        alike = served(slots[i].expand(rows))
        errors.append(float((together[i] - alike[i]).abs().max()) / unit)
    # NaN is an error too.
    if not max(errors) <= tolerance:
        raise Wrong(f"errors {errors} of the largest logit, allowed {tolerance}")
    return max(errors)


def _attach(scale: Scale, adapters: RandomAdapters, device: torch.device) -> dict[str, Any]:
    """Seconds until an adapter that was in no slot lies on the device, one at a time."""
    slab = Slab(adapters.layout, scale.slots, device=device)
    samples = []
    names = random.Random(0).sample(range(adapters.count), min(scale.attaches, adapters.count))
    with Pager(adapters, slab) as pager:
        for name in map(adapters.name, names):
            row = adapters.numbers(name)
            elapsed, lease = timed(lambda name=name: pager.acquire([name]), device)
            samples.append(elapsed)
            if not torch.equal(slab.rows[lease.slots[0]].cpu(), row.float()):
                raise Wrong(f"{name}: its slot holds other numbers")
            lease.release()
    samples.sort()
    return {
        "kind": KIND,
        "what": "attach",
        "bytes": adapters.layout.size * slab.dtype.itemsize,
        "attaches": len(samples),
        "p50_us": 1e6 * samples[len(samples) // 2],
        "p99_us": 1e6 * samples[int(0.99 * (len(samples) - 1))],
    }


def _trace(scale: Scale, pool: AdapterPool, adapters: RandomAdapters, clock: Clock) -> dict[str, Any]:
    """Waves of requests for Zipf-distributed adapters through few slots, over the same steps with slots that stay."""
    model: Any = pool.model
    source = random.Random(0)
    weights = list(accumulate(1 / k for k in range(1, scale.adapters + 1)))
    picked = source.choices(range(scale.adapters), cum_weights=weights, k=(scale.waves + 1) * scale.wave)
    names = [adapters.name(i) for i in picked]
    waves = [names[first : first + scale.wave] for first in range(0, len(names), scale.wave)]
    for name in names:
        adapters.row(name)
    step = Step(scale, scale.wave, pool.device)
    buffer = pool.slot_buffer(scale.wave)

    def paged() -> None:
        for number, wave in enumerate(waves[:-1]):
            with pool.acquire(wave) as lease:
                buffer.copy_(torch.tensor(lease.slots, dtype=torch.int32), non_blocking=True)
                pool.prefetch(waves[number + 1])
                for _ in range(scale.steps):
                    recorded.run()

    def resident() -> None:
        with pool.acquire(waves[0]) as lease:
            for _ in waves[:-1]:
                buffer.copy_(torch.tensor(lease.slots, dtype=torch.int32), non_blocking=True)
                for _ in range(scale.steps):
                    recorded.run()

    with pool.token_slots(buffer):
        recorded = clock.record([lambda: step(model)], graph=True)
        # Fills the slots.
        paged()
        _check_wave(pool, waves[-2], buffer, recorded)
        seconds: dict[str, list[float]] = {"paged": [], "resident": []}
        before = pool.stats()
        for _ in range(3):
            for name, call in (("paged", paged), ("resident", resident)):
                seconds[name].append(timed(call, pool.device)[0])
        after = pool.stats()
    tokens = scale.waves * scale.wave * scale.steps
    counts = {name: after[name] - before[name] for name in ("loads", "evictions", "waits", "failures", "timeouts")}
    return {
        "kind": KIND,
        "what": "Zipf trace",
        "adapters": scale.adapters,
        "slots": scale.slots,
        "in_flight": scale.wave,
        "new_tokens": scale.steps,
        **counts,
        "tokens_per_second": {name: tokens / statistics.median(some) for name, some in seconds.items()},
        "ratio": statistics.median(r / p for p, r in zip(seconds["paged"], seconds["resident"], strict=True)),
    }


def _check_wave(pool: AdapterPool, wave: list[str], buffer: Tensor, recorded: Timed) -> None:
    """Raise unless adapters that came through the pager have the numbers of their source."""
    with pool.acquire(wave) as lease:
        for name, slot in list(zip(wave, lease.slots, strict=True))[:8]:
            if not torch.equal(pool.slab.rows[slot].cpu(), pool.source.row(name).numbers.float()):
                raise Wrong(f"{name}: its slot holds other numbers")
        buffer.copy_(torch.tensor(lease.slots, dtype=torch.int32))
        if not all(bool(y.isfinite().all()) for y in recorded.outputs()):
            raise Wrong("the trace: logits are not finite")


def _without_figures(row: dict[str, Any], dry: bool) -> dict[str, Any]:
    figures = ("step_us", "tokens_per_second", "ratio", "p50_us", "p99_us") if dry else ()
    return {name: value for name, value in row.items() if name not in figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, a tiny model, no figures")
    dry = parser.parse_args().dry_run
    device, clock = (torch.device("cpu"), CpuClock()) if dry else (torch.device("cuda"), CudaClock())
    start = time.perf_counter()
    for row in measure(device, clock=clock, dry=dry):
        print(json.dumps(row), flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
