"""Seconds per step, all methods in turn on the same batches; and peak memory, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import random
import resource
import time
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks._measure import environment, ratio, summary

from .methods import ANCHOR, METHODS, Method
from .results import Results
from .runs import Data, frozen_model
from .training import Protocol, batches, optimiser, step

WARM_STEPS = 3
STEPS = 20
REPEATS = 3


def measure(methods: Sequence[Method], data: Data, protocol: Protocol, results: Results) -> None:
    """Note, for every method, the time of a step of training, its ratio to LoRA-XS's, and the peak memory."""
    longest = max(batches(data.parts["train"], protocol, seed=0), key=lambda batch: batch["input_ids"].numel())
    peaks = peak_memory([method.name for method in methods], longest, data.width)
    samples = step_seconds(methods, data, protocol)
    found = {
        name: {
            "step": summary(seconds),
            "over_loraxs": ratio(samples, name, ANCHOR) if ANCHOR in samples else None,
            "peak_bytes": peaks[name],
        }
        for name, seconds in samples.items()
    }
    content = {"environment": environment(), "task": data.name, "batch": protocol.batch, "methods": found}
    results.change(lambda whole: whole.update(speed=content))


def step_seconds(methods: Sequence[Method], data: Data, protocol: Protocol) -> dict[str, list[float]]:
    """Seconds of every method's step on the same batches; within a batch the order of the methods is shuffled."""
    models = {method.name: method.build(data.base(), seed=0).train() for method in methods}
    optimizers = {method.name: optimiser(models[method.name], method, method.rate) for method in methods}
    samples: dict[str, list[float]] = {name: [] for name in models}
    names, shuffler = list(models), random.Random(0)
    some = list(islice(batches(data.parts["train"], protocol, seed=0), WARM_STEPS + STEPS))
    for number, batch in enumerate(tqdm(some, "steps", leave=False, disable=None)):
        shuffler.shuffle(names)
        for name in names:
            start = time.perf_counter()
            step(models[name], optimizers[name], batch)
            if number >= WARM_STEPS:
                samples[name].append(time.perf_counter() - start)
    return samples


def peak_memory(names: Sequence[str], batch: Mapping[str, Tensor], width: int) -> dict[str, list[int]]:
    """Bytes that a process needs at its peak beyond one that runs the frozen model forward; `REPEATS` of each.

    The whole process counts: loading, whatever the method prepares from the weights, and three steps on the batch.
    Every process is forked from a server that has imported everything and computed nothing.
    """
    plain = {name: tensor.tolist() for name, tensor in batch.items()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found: dict[str, list[int]] = {name: [] for name in names}
    with context.Pool(1, maxtasksperchild=1) as pool:
        for _ in tqdm(range(REPEATS), "memory", leave=False, disable=None):
            frozen = pool.apply(_peak, (None, plain, width))
            for name in names:
                found[name].append(pool.apply(_peak, (name, plain, width)) - frozen)
    return found


def _peak(name: str | None, plain: Mapping[str, list], width: int) -> int:
    """Peak bytes of this process after three steps of a method, or after a forward pass of the frozen model."""
    batch = {key: torch.tensor(values) for key, values in plain.items()}
    base = frozen_model(width)
    if name is None:
        with torch.inference_mode():
            base.eval()(**batch)
    else:
        method = METHODS[name]
        model = method.build(base, seed=0).train()
        optimizer = optimiser(model, method, method.rate)
        for _ in range(WARM_STEPS):
            step(model, optimizer, batch)
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
