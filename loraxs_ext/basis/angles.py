"""How far a computed singular subspace is from the true one, for every rank that is a leading part of it."""

from __future__ import annotations

import torch
from torch import Tensor

# Singular values up to this many eps · σ_1 are what rounding left of zero.
ZERO_LEVEL = 16.0


def _suffix(values: Tensor, end: Tensor, scan: str) -> Tensor:
    """Sum or minimum over columns j > i of values [b, r, r] and the further column end [b, r], for i = 0…r−1."""
    tail = torch.cat([values[..., 1:], end[..., None]], -1).flip(-1)
    return (tail.cumsum(-1) if scan == "sum" else tail.cummin(-1).values).flip(-1)


def cut_bounds(
    chosen: Tensor, rest: Tensor, zero: Tensor, outside: Tensor, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bound of the subspace error after i = 1…r vectors, from their residuals and gaps.

    ‖(I − P_i) U_i‖_F² ≤ Σ_{p ≤ i} ‖r_p‖² / g_p² (Davis and Kahan 1970, vector by vector), where r_p is the part of
    W Wᵀ u_p outside the first i vectors, and g_p the distance of θ_p to all θ outside. Pairs that are both numerically
    zero do not count: no choice within the null space is wrong.

    Args:
        chosen: [b, r] values θ = σ² of the vectors, in their order.
        rest: [b, q] the other values, as far as they are known.
        zero: [b, 1] value up to which θ is zero.
        outside: [b, r] squared length of what W Wᵀ u_p has outside all r vectors.
        among: [b, r, r] squared u_qᵀ W Wᵀ u_p; None if the vectors are exactly Ritz vectors.

    Returns:
        The bounds [b, r], and the gaps [b, r] = min_{p ≤ i} g_p, +inf where nothing is outside.
    """
    inf = torch.inf
    others = torch.cat([chosen, rest, torch.full_like(chosen[:, :1], inf)], -1)
    distance = (chosen[..., :, None] - others[..., None, :]).abs()
    both_zero = (chosen <= zero)[..., :, None] & (others <= zero)[..., None, :]
    distance = torch.where(both_zero, inf, distance)
    rank = chosen.shape[-1]
    nearest = _suffix(distance[..., :rank], distance[..., rank:].amin(-1), "min")
    among = torch.zeros_like(nearest) if among is None else among
    # Even vectors without a residual are known no better than to rounding, so a gap of zero bounds nothing.
    floor = torch.finfo(chosen.dtype).eps * others[..., :-1].amax(-1)[..., None, None]
    residual = _suffix(among, outside, "sum").clamp_min(floor.square())
    before_cut = torch.ones(rank, rank, dtype=torch.bool, device=chosen.device).triu()
    share = torch.where(before_cut & (residual > 0), residual / nearest.square(), 0.0)
    return share.sum(-2).sqrt(), torch.where(before_cut, nearest, inf).amin(-2)


def moved(vectors: Tensor, before: Tensor) -> Tensor:
    """‖(I − P_i) V_i‖_F for i = 1…r: how far each leading part of a Krylov method's Ritz vectors turned.

    Args:
        vectors: [b, w, w] coefficients of all Ritz vectors now, in descending order.
        before: [b, w', r] those of the leading ones earlier, in the first w' ≤ w basis vectors.

    Returns:
        [b, r].
    """
    overlap = (vectors[:, : before.shape[1]].mT @ before).square()
    below = overlap.cumsum(-1).flip(-2).cumsum(-2).flip(-2)
    below = torch.cat([below, torch.zeros_like(below[:, :1])], 1)
    cut = torch.arange(before.shape[-1], device=vectors.device)
    return below[:, cut + 1, cut].sqrt()
