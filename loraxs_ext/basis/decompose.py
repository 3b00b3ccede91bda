"""The bases of a whole model: grouped by shape, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .factors import Factors, place_sigma
from .precision import check_floating, finite_peaks, full_precision, scale_exponents, times_power_of_two
from .recipe import Recipe
from .solver import Convergence, check_rank, solve, warn_unconverged


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
    recipe = Recipe() if recipe is None else recipe
    out = {}
    measured = {}
    for name, source in tqdm(weights.items(), disable=not progress):
        W = source() if callable(source) else source
        W = W.detach()
        check_floating(W, name)
        rank = ranks if isinstance(ranks, int) else ranks[name]
        check_rank(rank, W.shape, name)
        with full_precision(W.device):
            stack = W[None].to(torch.float64 if W.dtype == torch.float64 else torch.float32)
            exponents = scale_exponents(finite_peaks(stack, [name]))
            stack = times_power_of_two(stack, [-e for e in exponents])
            found = solve(stack, rank, recipe)
            if recipe.sigma == "B":
                left, right = found.right @ stack.mT, found.right
            else:
                left, right = found.left, found.projected
            a, bt = place_sigma(left, right, found.s, recipe.sigma, exponents)
        conv = found.convergence()[0]
        measured[name] = conv
        s = times_power_of_two(found.s, exponents)
        out[name] = Factors(a[0].to(device, dtype), bt[0].to(device, dtype), s[0].to(device), conv.error)
    warn_unconverged(measured, recipe.tol)
    return out
