"""Chebyshev-filtered subspace iteration: the top singular vectors by large products and l × l eigenproblems only.

Between two Rayleigh–Ritz steps every vector goes through a Chebyshev polynomial of the Gram matrix M = W Wᵀ that is
small on [0, θ_l] and grows fastest beyond it (Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219, 2006). Unlike a
Krylov space the subspace does not grow, so nothing but products with W is large: the method of accelerators.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .angles import ZERO_LEVEL, converged, cut_bounds, ritz_angle, rounding_angle
from .exact import Subspace, empty_subspace, gram_subspace
from .orthonormal import orthonormalize_rows
from .precision import multiply_rows, reduced_precision
from .probes import START, probes

_eigh = torch.ops.loraxs._eigh.default

# Applications of M to the random start before the first Ritz values are worth filtering by.
_START_STEPS = 2
# A filter may magnify the first vector over the last wanted one by this much: rounding puts eps times as much of the
# first into the last, and orthonormalising in order removes that, as long as something else is left.
_SPREAD = {torch.float32: 1e4, torch.float64: 1e9}
_MAX_DEGREE = 16
# True errors were at most 1.02 times the bare estimate (320 runs over flat, clustered and spiked spectra).
_SAFETY = 2.0
# Filters run in TF32 (bf16 on a CPU) until the estimate is this small. They are corrected by those that follow, and
# what decides about convergence, the Rayleigh–Ritz step, is never reduced. Half as many bits cost no iteration there.
_REDUCED_UNTIL = 0.1


def subspace_width(rank: int, n_oversamples: int) -> int:
    """Vectors l that are filtered together: a wide gap θ_r/θ_l needs fewer passes over W (measured: best at 2–3 r)."""
    return max(64, rank + max(rank, n_oversamples))


def chebyshev_subspace(
    short: Tensor, rank: int, n_oversamples: int, tol: float, max_iter: int, seed: int, *, reduced: bool = False
) -> Subspace:
    """Top singular vectors of the shorter side, iterated until the estimated subspace error meets `tol`.

    A matrix whose side is less than twice the number of vectors is decomposed completely instead. The degree of a
    filter is chosen for each matrix, so, but for `reduced`, what else is in a batch matters to rounding only. As in
    `lanczos_subspace`, iteration ends early where rounding in W's dtype exceeds `tol` tenfold. The device is waited for
    once a filter, and twice more where a matrix is finished.

    Args:
        short: [b, n, m] with n ≤ m, entries of moderate size.
        rank: vectors wanted.
        n_oversamples: further vectors, at least.
        tol: target of the sine of the largest angle at the cut.
        max_iter: bound on the applications of M; the last filter may exceed it by less than its degree.
        seed: of the starting block.
        reduced: let early filters of fp32 matrices run in the device's reduced precision.
    """
    batch, n, _ = short.shape
    width = subspace_width(rank, n_oversamples)
    if 2 * width > n:
        return gram_subspace(short, rank)
    eps = torch.finfo(short.dtype).eps
    result = empty_subspace(short, rank)
    place = torch.arange(batch, device=short.device)
    going = torch.ones_like(place, dtype=torch.bool)
    steps = torch.full_like(place, _START_STEPS)
    last = torch.full((batch,), torch.inf, dtype=torch.float64, device=short.device)
    scale = torch.linalg.vector_norm(short, dim=(-2, -1)).double()
    rows = orthonormalize_rows(probes(width, n, START, seed=seed, device=short.device, dtype=short.dtype))
    rows = rows.expand(batch, -1, -1)
    for _ in range(_START_STEPS):
        rows = orthonormalize_rows(_apply_gram(rows, short))
    while True:
        rows, values, image = _ritz(rows, short)
        steps = steps + going
        squares = (image - values[..., None].to(rows.dtype) * rows).double().square().sum(-1)
        zero = (ZERO_LEVEL * eps) ** 2 * values[:, :1]
        drift, gap = ritz_angle(values, squares, rank, zero, _SAFETY)
        rounding = rounding_angle(values[:, :rank], scale, gap, short.dtype, n)
        ended = going & (converged(drift, rounding, tol) | (steps >= max_iter))
        # Reduced precision is over for all once one of them no longer gains by it.
        gains = (drift > _REDUCED_UNTIL) & (drift < 0.5 * last)
        degree, last = _degree(values, drift / tol, rank, rows.dtype), drift
        going = going & ~ended
        remaining, highest, coarse = torch.stack(
            [going.sum(), (degree * going).amax(), (gains | ~going).all()]
        ).tolist()
        if remaining < len(going):
            where = ended.nonzero()[:, 0]
            bounds, _ = cut_bounds(values[:, :rank], values[:, rank:], zero, squares[:, :rank])
            bounds[:, -1] = drift
            result.basis[place[where]] = rows[where, :rank]
            result.rest[place[where]] = values[where, rank : rank + 1].sqrt()
            result.drift[place[where]] = (bounds + rounding[:, None])[where]
            result.steps[place[where]] = steps[where]
        if remaining == 0:
            return result
        if 2 * remaining <= len(going):
            # Copying the weights that are left costs about a pass, and saves half of every further one.
            short, rows, image, values = short[going], rows[going], image[going], values[going]
            place, steps, scale, last, degree = place[going], steps[going], scale[going], last[going], degree[going]
            going = going[going]
        with reduced_precision(short.device, enabled=bool(reduced and coarse)):
            rows = _filter(rows, image, short, values, degree, highest)
        rows = orthonormalize_rows(rows)
        steps = steps + going * (degree - 1)


def _apply_gram(rows: Tensor, short: Tensor) -> Tensor:
    return multiply_rows(multiply_rows(rows, short), short.mT)


def _ritz(rows: Tensor, short: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz vectors in descending order, their values θ [b, l] in fp64, and M times the vectors.

    The l × l problems stay on the device: a copy to the host and back would cost 0.2 ms each at l = 64 (a model).
    """
    image = multiply_rows(rows, short)
    wide = image.double()
    values, rotation = _eigh(wide @ wide.mT)
    rotation = rotation.flip(-1).mT.to(rows.dtype)
    return rotation @ rows, values.flip(-1).clamp_min(0.0), multiply_rows(rotation @ image, short.mT)


def _degree(values: Tensor, excess: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """[b] degree of the next filter: what is missing to the tolerance, within what rounding allows.

    T_d grows like exp(d · acosh(2θ/θ_l − 1)) beyond θ_l, so its use and its danger both depend on σ_1/σ_l.
    """
    growth = torch.acosh(2.0 * values[:, [0, rank - 1]] / _edge(values) - 1.0)
    spread = (growth[:, 0] - growth[:, 1]).clamp_min(1e-6)
    allowed = math.log(_SPREAD[dtype]) / spread
    needed = (excess.clamp(1.0, 1e12).log() + 1.0) / growth[:, 1].clamp_min(1e-6)
    return torch.minimum(allowed.floor(), needed.ceil()).clamp(1, _MAX_DEGREE).long()


def _edge(values: Tensor) -> Tensor:
    """[b, 1] the upper end θ_l of what a filter damps; not zero where the matrix is, and below every θ."""
    return values[:, -1:].clamp_min(1e-14 * values[:, :1]).clamp_min(1e-300)


def _filter(rows: Tensor, image: Tensor, short: Tensor, values: Tensor, degree: Tensor, highest: int) -> Tensor:
    """T_d(2M/θ_l − 1) applied to Ritz vectors, each divided by its own growth so that all keep their length.

    Args:
        rows: [b, l, n] Ritz vectors of M.
        image: [b, l, n], M times them.
        short: [b, n, m], the matrices.
        values: [b, l] Ritz values.
        degree: [b] the d of each matrix.
        highest: the largest of them that still counts, known to the host.
    """
    edge = _edge(values)
    inverse = (2.0 / edge)[..., None].to(rows.dtype)
    growth = (2.0 * torch.maximum(values, edge) / edge - 1.0)[..., None].to(rows.dtype)
    before, now, ratio = rows, (image * inverse - rows) / growth, 1.0 / growth
    for step in range(1, highest):
        # ratio is T_{j−1}/T_j at the Ritz values: the recurrence never forms the growth itself.
        following = 1.0 / (2.0 * growth - ratio)
        shifted = _apply_gram(now, short) * inverse - now
        after = (2.0 * shifted - before * ratio) * following
        open_ = (degree > step)[:, None, None]
        before, now, ratio = now, torch.where(open_, after, now), following
    return now
