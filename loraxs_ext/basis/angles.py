"""How far a computed singular subspace is from the true one, for every rank that is a leading part of it."""

from __future__ import annotations

import torch
from torch import Tensor

# Singular values up to this many eps · σ_1 are what rounding left of zero.
ZERO_LEVEL = 16.0
# Rounding turns the subspace by about eps / gap of σ² times (products) 4 σ_r ‖W‖_F/√n and (projection) 0.3 σ_1²/√n:
# an upper estimate of what spectra with and without spikes showed in fp32. Ten times the tolerance is hopeless.
_ROUNDING_PRODUCT, _ROUNDING_PROJECTION = 4.0, 0.3
_HOPELESS = 10.0


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


def ritz_angle(values: Tensor, squares: Tensor, rank: int, zero: Tensor, safety: float) -> tuple[Tensor, Tensor]:
    """Estimated subspace error of the leading `rank` of a larger set of Ritz vectors, and the gap at the cut.

    The residuals r_i are orthogonal to all of the vectors, so perturbation theory gives the wanted ones components
    |r_i| / (θ_i − λ) outside of them, where λ is the largest eigenvalue out there, and |r_i| |r_j| / ((θ_i − λ)(θ_i −
    θ_j)) along an unwanted vector j: a small gap at the cut matters in second order only.

    Args:
        values: [b, l] Ritz values θ = σ² in descending order, l > rank.
        squares: [b, l] squared lengths of the residuals.
        rank: vectors wanted.
        zero: [b, 1] value up to which θ is zero.
        safety: factor for what the estimate leaves out.

    Returns:
        [b] estimates, and [b] gaps θ_r − θ_{r+1}, +inf where both are zero.
    """
    wanted, unwanted = values[:, :rank], values[:, rank:]
    # If no direction was missed, every eigenvalue outside is below every unwanted one, which θ_j + |r_j| bounds.
    level = (unwanted + squares[:, rank:].sqrt()).amin(-1, keepdim=True)
    first = torch.where(wanted > zero, squares[:, :rank] / (wanted - level).square(), 0.0)
    second = squares[:, None, rank:] / (wanted[..., None] - unwanted[:, None]).square()
    second = torch.where((unwanted > zero)[:, None], second, 0.0).sum(-1)
    estimate = safety * (first * (1.0 + second)).sum(-1).sqrt()
    crossed = ((wanted <= level) & (wanted > zero)).any(-1)
    gap = wanted[:, -1] - unwanted[:, 0]
    return (
        torch.where(crossed | estimate.isnan(), torch.inf, estimate),
        torch.where(wanted[:, -1] > zero[:, 0], gap, torch.inf),
    )


def rounding_angle(theta: Tensor, scale: Tensor, gap: Tensor, dtype: torch.dtype, side: int) -> Tensor:
    """How far rounding of products in `dtype` turns the leading subspace: an upper estimate.

    Args:
        theta: [b, r] squared singular values, descending.
        scale: [b] Frobenius norms of the matrices.
        gap: [b] of the squared singular values at the cut.
        dtype: of the products.
        side: the shorter one.

    Returns:
        [b] sines of angles.
    """
    products = _ROUNDING_PRODUCT * scale * theta[:, -1].sqrt()
    return torch.finfo(dtype).eps / side**0.5 * (products + _ROUNDING_PROJECTION * theta[:, 0]) / gap


def converged(drift: Tensor, rounding: Tensor, tol: float) -> Tensor:
    """Whether to stop: the error meets `tol`, or rounding alone exceeds it and the rest is small, or it is hopeless.

    Args:
        drift: [b] estimated error of the iteration.
        rounding: [b] estimated error of rounding.
        tol: what both together should not exceed; some is left for the rounding of the result.
    """
    return (drift + rounding <= 0.9 * tol) | (drift <= 0.1 * tol) | (rounding > _HOPELESS * tol)
