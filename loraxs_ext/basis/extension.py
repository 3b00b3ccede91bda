"""More triplets for a basis that must keep the ones it has."""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factors, place_sigma
from .orthonormal import orthonormalize_rows
from .precision import check_floating, full_precision, scale_exponents, times_power_of_two
from .recipe import Recipe
from .solver import canonical_signs, check_rank, solve, warn_unconverged


def extend(old: Factors, W: Tensor, rank: int, recipe: Recipe, *, name: str = "W") -> Factors:
    """Factors of a larger rank whose first rows are those of `old`, bit for bit.

    The new rows are singular vectors of what the old ones leave of W (vectors="top": of W − U_old U_oldᵀ W), so every
    adapter trained on `old` stays valid. They are orthogonal to the old ones and fit W exactly, as in `decompose`.

    Args:
        old: factors of rank r_old, made with `recipe` from W.
        W: [N, K], the weight.
        rank: of the result; `old` cut to its first rows if it is not larger than r_old.
        recipe: the recipe of `old`.
        name: of the weight, for messages.

    Returns:
        Factors of rank `rank` in old's dtype and device.

    Raises:
        TypeError: W is not a floating-point tensor.
        ValueError: rank is out of range, W holds NaN or Inf, its shape does not fit `old`, or a basis of
            svd="reference" should grow: that of a larger rank has other vectors.
    """
    check_floating(W, name)
    check_rank(rank, W.shape, name)
    have = len(old.s)
    shape = (old.bt.shape[1], old.a.shape[1])
    if shape != tuple(W.shape):
        raise ValueError(f"old belongs to a weight of shape {shape}, but weight {name!r} has shape {tuple(W.shape)}")
    if recipe.svd == "reference" and rank > have:
        raise ValueError(
            f"the basis of weight {name!r} cannot grow from rank {have} to {rank}: svd='reference' has other "
            "vectors for every rank, which are not nested"
        )
    if rank <= have:
        return Factors(old.a[:rank], old.bt[:rank], old.s[:rank], old.subspace_error)
    mirrored = recipe.sigma == "B"
    with full_precision(W.device):
        stack = W[None].to(torch.float64 if W.dtype == torch.float64 else torch.float32)
        exponents = scale_exponents(stack, [name])
        stack = times_power_of_two(stack, [-e for e in exponents])
        # The rows without singular values are the orthonormal ones; "sqrt" scales both, and is led by the left ones.
        side = stack.mT if mirrored else stack
        kept = orthonormalize_rows((old.a if mirrored else old.bt).to(stack)[None])
        if recipe.vectors == "top":
            found = solve(side - kept.mT @ (kept @ side), rank - have, recipe)
            fresh = found.left
        else:
            found = solve(side, rank, recipe)
            fresh = found.left[:, have:]
        fresh = orthonormalize_rows(torch.cat([kept, fresh], 1))[:, have:]
        image = fresh @ side
        sign = canonical_signs(image if mirrored else fresh)
        fresh, image = fresh * sign, image * sign
        s = torch.linalg.vector_norm(image.double(), dim=-1).to(stack.dtype)
        left, right = (image, fresh) if mirrored else (fresh, image)
        a, bt = place_sigma(left, right, s, recipe.sigma, exponents)
    warn_unconverged({name: found.convergence()[0]}, recipe.tol)
    grown = [
        torch.cat([rows, fresh_rows[0].to(rows)])
        for rows, fresh_rows in ((old.a, a), (old.bt, bt), (old.s, times_power_of_two(s, exponents)))
    ]
    return Factors(grown[0], grown[1], grown[2], max(old.subspace_error, found.convergence()[0].error))
