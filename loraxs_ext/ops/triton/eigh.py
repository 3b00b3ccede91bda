"""loraxs::_eigh: one-sided Jacobi of symmetric fp64 matrices, one program a matrix, disjoint pairs of rows at a time.

Rotations of rows that make the rows of a positive definite G orthogonal leave Λ Vᵀ: its rows, scaled to length 1, are
the eigenvectors (Hestenes, J. SIAM 6, 1958). G = A + shift is definite whatever A is and its rows are about as long as
each other, so none is lost where A is singular. In each of n − 1 steps of a sweep all rows meet in other pairs, as in a
round-robin tournament (Brent and Luk, SIAM J. Sci. Stat. Comput. 6, 1985); a sweep that finds nothing to turn is the
last. A matrix that is nearly diagonal, as those of Rayleigh–Ritz after a filter are, needs few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import power_of_two

# Of A scaled to a spectral norm between 1/2 and 1.
SHIFT = 1.5
# A pair whose squared cosine is at most NOISE is orthogonal to rounding and stays as it is; when no pair of a whole
# sweep was above CONVERGED, VᵀV = I holds to 3e-14, and to 1e-15 where that sweep still turned pairs.
NOISE = 2.0**-104
CONVERGED = 1e-27
# 10 at n = 128 for spectra without multiple values, 23 for the worst of those with (128 values between 1 and 1e-16).
MAX_SWEEPS = 40
# Entries of a tile, 8 for each of 256 threads: two tiles and what becomes of them fit the registers. Every entry is
# held by one thread only: another could read it after the first has replaced it.
TILE = 2048
WARPS = 8
# Extents of rows in tiles.
MIN_BLOCK_N, MAX_BLOCK_N = 64, 128


@triton.jit
def _jacobi_kernel(
    gG, n,
    NOISE: tl.constexpr, CONVERGED: tl.constexpr, MAX_SWEEPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of G [batch, n, n] become its eigenvectors, in place; NaN after MAX_SWEEPS without convergence."""
    gG += tl.program_id(0).to(tl.int64) * n * n
    # An odd n has a bye: row n, which does not exist.
    pairs = (n + 1) // 2
    others = 2 * pairs - 1
    column = tl.arange(0, BLOCK_N)
    remaining = MAX_SWEEPS + 1
    while remaining > 1:
        worst = tl.zeros((BLOCK_P,), tl.float64)
        for step in range(others):
            for first in range(0, pairs, BLOCK_P):
                pair = first + tl.arange(0, BLOCK_P)
                # The last row stays at its place, the others walk around the table.
                i = tl.where(pair == 0, others, (step + pair) % others)
                j = (step + others - pair) % others
                mask = ((pair < pairs) & (i < n) & (j < n))[:, None] & (column < n)
                left, right = gG + i[:, None] * n + column, gG + j[:, None] * n + column
                ti = tl.load(left, mask=mask, other=0.0)
                tj = tl.load(right, mask=mask, other=0.0)
                square_i, square_j, dot = tl.sum(ti * ti, 1), tl.sum(tj * tj, 1), tl.sum(ti * tj, 1)
                squares = square_i * square_j
                turn = dot * dot > NOISE * squares
                worst = tl.maximum(worst, tl.where(turn, dot * dot / tl.where(turn, squares, 1.0), 0.0))
                # The tangent of the smaller angle that makes the two orthogonal.
                gap = square_j - square_i
                long = tl.abs(gap) + tl.sqrt(gap * gap + 4.0 * dot * dot)
                tangent = tl.where(gap < 0.0, -2.0, 2.0) * dot / tl.where(turn, long, 1.0)
                cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
                sine = tangent * cosine
                mask = mask & turn[:, None]
                tl.store(left, cosine[:, None] * ti - sine[:, None] * tj, mask=mask)
                tl.store(right, sine[:, None] * ti + cosine[:, None] * tj, mask=mask)
            tl.debug_barrier()
        remaining = tl.where(tl.max(worst, 0) <= CONVERGED, 0, remaining - 1)

    for first in range(0, n, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        mask = (row < n)[:, None] & (column < n)
        place = gG + row[:, None] * n + column
        tile = tl.load(place, mask=mask, other=0.0)
        length = tl.sqrt(tl.sum(tile * tile, 1))
        length = tl.where(row < n, length, 1.0)
        length = tl.where(remaining == 0, length, float("nan"))
        tl.store(place, tile / length[:, None], mask=mask)


def eigh(A: Tensor, max_sweeps: int = MAX_SWEEPS) -> tuple[Tensor, Tensor]:
    """See `ops.eigh`; fp64, n ≤ 128. NaN or Inf in a matrix, or want of sweeps, become NaN in its results."""
    batch, n, _ = A.shape
    if A.numel() == 0:
        return A.new_empty(batch, n), A.new_empty(A.shape).mT
    peak = A.abs().amax((-2, -1), keepdim=True)
    scaled = (A / torch.where(peak > 0, peak, 1.0)).contiguous()
    rows = _orthogonal_rows(scaled, max_sweeps)
    # Once more for a nearly diagonal matrix: one or two sweeps that undo the rounding of the thousand rotations before.
    # At n = 128 they bring the residual from 20 to 3 ulp of ‖A‖; LAPACK's is 2.
    rows = _orthogonal_rows(rows @ scaled @ rows.mT, max_sweeps) @ rows
    values, order = ((rows @ scaled * rows).sum(-1) * peak[..., 0]).sort(stable=True)
    return values, rows.gather(1, order[..., None].expand(rows.shape)).mT


def _orthogonal_rows(A: Tensor, max_sweeps: int) -> Tensor:
    """[batch, n, n] the eigenvectors of A as rows, in no order."""
    n = A.shape[-1]
    block = power_of_two(n, MIN_BLOCK_N, MAX_BLOCK_N)
    G = A / _norm_bound(A)
    G.diagonal(dim1=-2, dim2=-1).add_(SHIFT)
    _jacobi_kernel[(len(G),)](
        G, n, NOISE=NOISE, CONVERGED=CONVERGED, MAX_SWEEPS=max_sweeps, BLOCK_P=TILE // block, BLOCK_N=block,
        num_warps=WARPS,
    )  # fmt: skip
    return G


def _norm_bound(A: Tensor) -> Tensor:
    """[batch, 1, 1] ‖A⁴‖_F^¼: at least the spectral norm, and at n = 128 at most 1.84 times it; 1 for zeros."""
    square = A @ A
    bound = torch.linalg.vector_norm(square @ square, dim=(-2, -1), keepdim=True) ** 0.25
    return torch.where(bound > 0, bound, 1.0)
