"""The bases of a whole model: equal shapes decomposed together, in bounded memory, remembered on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import BasisCache, Entry, cache_directory
from .factors import Factors, place_sigma
from .fingerprints import fingerprint
from .precision import check_floating, finite_peaks, full_precision, multiply_rows, scale_exponents, times_power_of_two
from .recipe import Recipe
from .solver import Convergence, check_rank, solve, warn_unconverged

# Weights that wait for others of their shape, in bytes of the dtype they are decomposed in: an accelerator wants many
# at once; a CPU takes them one by one anyway.
_CHUNK_BYTES_CPU, _CHUNK_BYTES_DEVICE = 64 << 20, 1 << 30


class _Job(NamedTuple):
    name: str
    weight: Tensor
    rank: int
    key: str | None


def decompose(
    weights: Mapping[str, Tensor | Callable[[], Tensor]],
    ranks: Mapping[str, int] | int,
    recipe: Recipe | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Factors]:
    """Frozen factors A and B of every weight of a model.

    Args:
        weights: by name, [N, K] tensors of fp32, fp64, bf16 or fp16, or functions that return one (for weights that are
            dequantised or gathered on the way; each is called once, and few results of a shape are held at a time).
        ranks: by name, or one for all; between 1 and min(N, K).
        recipe: how the basis is chosen; the default recipe if None.
        cache_dir: directory of stored factors, "default" for $LORAXS_CACHE or ~/.cache/loraxs_ext, None for no cache.
        progress: show a bar.
        dtype: of a and bt; that of the decomposition if None (fp64 for fp64 weights, else fp32).
        device: of the results; that of each weight if None.

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
    done: dict[str, Factors] = {}
    measured: dict[str, Convergence] = {}
    waiting: dict[tuple[object, ...], list[_Job]] = {}
    with tqdm(total=len(weights), desc="basis", unit="matrix", disable=not progress, leave=False) as bar:

        def finish(job: _Job, entry: Entry) -> None:
            measured[job.name] = Convergence(float(entry.errors[-1]), float(entry.gaps[-1]), int(entry.steps))
            place = job.weight.device if device is None else device
            # Copies, because the entry is a part of larger tensors that would be kept, and saved, with it.
            a, bt, s = (
                part.to(device=place, dtype=kind).clone(memory_format=torch.contiguous_format)
                for part, kind in ((entry.a, dtype), (entry.bt, dtype), (entry.s, None))
            )
            done[job.name] = Factors(a, bt, s, measured[job.name].error)
            bar.update()

        def flush(group: list[_Job]) -> None:
            for job, entry in zip(group, _compute(group, recipe), strict=True):
                if cache is not None and job.key is not None:
                    cache.store(job.key, entry)
                finish(job, entry)

        # A function of its own, so that no variable keeps a weight alive while the next one is loaded.
        def take(name: str, source: Tensor | Callable[[], Tensor]) -> None:
            weight = (source if isinstance(source, Tensor) else source()).detach()
            check_floating(weight, name)
            if weight.ndim != 2:
                raise ValueError(f"weight {name!r} must be a matrix [N, K], got shape {tuple(weight.shape)}")
            rank = ranks if isinstance(ranks, int) else ranks[name]
            check_rank(rank, weight.shape, name)
            exact_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            job = _Job(name, weight, rank, None if cache is None else fingerprint(weight))
            if cache is not None and job.key is not None:
                entry = cache.load(job.key, (weight.shape[0], weight.shape[1]), exact_dtype, rank)
                if entry is not None:
                    return finish(job, entry)
            kind = (weight.shape, exact_dtype, weight.device, rank)
            waiting.setdefault(kind, []).append(job)
            limit = _CHUNK_BYTES_CPU if weight.device.type == "cpu" else _CHUNK_BYTES_DEVICE
            if len(waiting[kind]) * weight.numel() * exact_dtype.itemsize >= limit:
                flush(waiting.pop(kind))

        for name, source in weights.items():
            take(name, source)
        for group in waiting.values():
            flush(group)
    warn_unconverged(measured, recipe.tol)
    return {name: done[name] for name in weights}


def _compute(group: list[_Job], recipe: Recipe) -> list[Entry]:
    """Entries of weights of one shape, dtype, device and rank."""
    first = group[0]
    dtype = torch.float64 if first.weight.dtype == torch.float64 else torch.float32
    with full_precision(first.weight.device):
        stack = torch.stack([job.weight.to(dtype) for job in group])
        exponents = scale_exponents(finite_peaks(stack, [job.name for job in group]))
        stack = times_power_of_two(stack, [-exponent for exponent in exponents])
        found = solve(stack, first.rank, recipe)
        if recipe.sigma == "B":
            left, right = multiply_rows(found.right, stack.mT), found.right
        else:
            left, right = found.left, found.projected
        a, bt = place_sigma(left, right, found.s, recipe.sigma, exponents)
        s = times_power_of_two(found.s, exponents)
    return [Entry(*parts) for parts in zip(a, bt, s, found.errors, found.gaps, found.steps[:, None], strict=True)]
