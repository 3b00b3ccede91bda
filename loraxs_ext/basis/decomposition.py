"""The bases of a whole model: equal shapes decomposed together, in bounded memory, remembered on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import BasisCache, Entry, cache_directory
from .factors import Factors, place_sigma
from .fingerprints import fingerprint
from .precision import check_floating, full_precision, multiply_rows, scale_exponents, times_power_of_two
from .recipe import Recipe
from .solver import Convergence, check_rank, solve, warn_unconverged
from .streaming import Stack, Stager, chunk_bytes, prefetched

# A CPU that decomposes is busy with that; an accelerator leaves it free to load, dequantise and copy what comes next.
_PREFETCH_FOR = {"cuda"}


class _Job(NamedTuple):
    name: str
    rank: int
    key: str | None
    device: torch.device


class _Found(NamedTuple):
    """Weights of one kind that are to be decomposed together, or the stored entry of a single one."""

    jobs: list[_Job]
    stack: Stack | None = None
    entry: Entry | None = None


def decompose(
    weights: Mapping[str, Tensor | Callable[[], Tensor]],
    ranks: Mapping[str, int] | int,
    recipe: Recipe | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compute_device: torch.device | str | None = None,
) -> dict[str, Factors]:
    """Frozen factors A and B of every weight of a model.

    Args:
        weights: by name, [N, K] tensors of fp32, fp64, bf16 or fp16, or functions that return one (for weights that are
            dequantised or gathered on the way; each is called once, in order, and few results are held at a time).
        ranks: by name, or one for all; between 1 and min(N, K).
        recipe: how the basis is chosen; the default recipe if None.
        cache_dir: directory of stored factors, "default" for $LORAXS_CACHE or ~/.cache/loraxs_ext, None for no cache.
        progress: show a bar.
        dtype: of a and bt; that of the decomposition if None (fp64 for fp64 weights, else fp32).
        device: of the results; that of each weight if None.
        compute_device: where to decompose; on each weight's own device if None. Weights elsewhere are copied there in
            chunks that fit its free memory; for a CUDA device, the next ones are loaded, dequantised and copied by a
            thread while the last ones are decomposed.

    Returns:
        Factors by name, in the order of `weights`. The relation of a, bt and the weight holds to the rounding of one
        product in the dtype of the decomposition.

    Raises:
        KeyError: `ranks` lacks a name.
        TypeError: a weight is not a floating-point tensor.
        ValueError: a weight is not a matrix, or contains NaN or Inf, or a rank is out of range; it is named.

    Warns:
        RuntimeWarning: subspace errors above the tolerance, with numbers; cache files that had to be ignored.
    """
    recipe = Recipe() if recipe is None else recipe
    directory = cache_directory(cache_dir)
    cache = None if directory is None else BasisCache(directory, recipe)
    target = None if compute_device is None else torch.device(compute_device)
    done: dict[str, Factors] = {}
    measured: dict[str, Convergence] = {}
    # Made here and not by the thread, because it is this thread's stream that the weights may be on.
    stager = None if target is None else Stager(target, overlap=True)
    groups = _groups(weights, ranks, cache, stager)
    if target is not None and target.type in _PREFETCH_FOR:
        groups = prefetched(groups)
    # One matrix is asked for by who shows the progress of many.
    hidden = not progress or len(weights) == 1
    with tqdm(total=len(weights), desc="basis", unit="matrix", disable=hidden, leave=False) as bar:
        for found in groups:
            for job, entry in zip(found.jobs, _entries(found, recipe, cache), strict=True):
                measured[job.name] = Convergence(float(entry.errors[-1]), float(entry.gaps[-1]), int(entry.steps))
                place = job.device if device is None else device
                # Copies, because the entry is a part of larger tensors that would be kept, and saved, with it.
                a, bt, s = (
                    part.to(device=place, dtype=kind).clone(memory_format=torch.contiguous_format)
                    for part, kind in ((entry.a, dtype), (entry.bt, dtype), (entry.s, None))
                )
                done[job.name] = Factors(a, bt, s, measured[job.name].error, job.key)
                bar.update()
            # Nothing may keep these weights alive while the next ones are loaded.
            del found
    if recipe.svd != "reference":
        warn_unconverged(measured, recipe.tol)
    return {name: done[name] for name in weights}


def _groups(
    weights: Mapping[str, Tensor | Callable[[], Tensor]],
    ranks: Mapping[str, int] | int,
    cache: BasisCache | None,
    stager: Stager | None,
) -> Iterator[_Found]:
    """What to decompose, in chunks that fit the memory of the stager's device, or of each weight's own without one."""
    waiting: dict[tuple[object, ...], list[tuple[_Job, Tensor]]] = {}
    stagers: dict[torch.device, Stager] = {}

    def flush(kind: tuple[object, ...]) -> _Found:
        jobs, tensors = zip(*waiting.pop(kind), strict=True)
        device = tensors[0].device
        own = stagers.setdefault(device, Stager(device, reuse=True)) if stager is None else stager
        return _Found(list(jobs), stack=own.stack(tensors, _exact_dtype(tensors[0])))

    # A function of its own, so that no variable keeps a weight alive while the next one is loaded.
    def take(name: str, source: Tensor | Callable[[], Tensor]) -> _Found | None:
        weight = (source if isinstance(source, Tensor) else source()).detach()
        check_floating(weight, name)
        if weight.ndim != 2:
            raise ValueError(f"weight {name!r} must be a matrix [N, K], got shape {tuple(weight.shape)}")
        rank = ranks if isinstance(ranks, int) else ranks[name]
        check_rank(rank, weight.shape, name)
        dtype = _exact_dtype(weight)
        job = _Job(name, rank, None if cache is None else fingerprint(weight), weight.device)
        if cache is not None and job.key is not None:
            entry = cache.load(job.key, (weight.shape[0], weight.shape[1]), dtype, rank)
            if entry is not None:
                return _Found([job], entry=entry)
        where = weight.device if stager is None else stager.device
        kind = (weight.shape, dtype, where, rank)
        waiting.setdefault(kind, []).append((job, weight))
        full = len(waiting[kind]) * weight.numel() * dtype.itemsize >= chunk_bytes(where)
        return flush(kind) if full else None

    for name, source in weights.items():
        with contextlib.nullcontext() if stager is None else stager.running():
            found = take(name, source)
        if found is not None:
            yield found
            del found
    for kind in list(waiting):
        yield flush(kind)


def _exact_dtype(weight: Tensor) -> torch.dtype:
    """What a weight is decomposed in: fp64 for fp64, else fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _entries(found: _Found, recipe: Recipe, cache: BasisCache | None) -> list[Entry]:
    """The stored entry, or computed ones, which are stored."""
    if found.stack is None:
        return [] if found.entry is None else [found.entry]
    entries = _compute(found.stack.wait(), found.jobs, recipe)
    for job, entry in zip(found.jobs, entries, strict=True):
        if cache is not None and job.key is not None:
            cache.store(job.key, entry)
    return entries


def _compute(stack: Tensor, jobs: list[_Job], recipe: Recipe) -> list[Entry]:
    """Entries of weights of one shape and rank, [b, N, K] in the dtype of the decomposition."""
    with full_precision(stack.device):
        exponents = scale_exponents(stack, [job.name for job in jobs])
        stack = times_power_of_two(stack, [-exponent for exponent in exponents])
        found = solve(stack, jobs[0].rank, recipe)
        if recipe.sigma == "B":
            left, right = multiply_rows(found.right, stack.mT), found.right
        else:
            left, right = found.left, found.projected
        a, bt = place_sigma(left, right, found.s, recipe.sigma, exponents)
        s = times_power_of_two(found.s, exponents)
    return [Entry(*parts) for parts in zip(a, bt, s, found.errors, found.gaps, found.steps[:, None], strict=True)]
