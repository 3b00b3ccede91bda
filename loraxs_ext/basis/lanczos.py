"""Block Lanczos: the top singular vectors of large matrices with few products, stopped by a measured error.

A basis of the block Krylov space of the Gram matrix M = W Wᵀ is kept orthonormal against all of itself (Golub, Luk,
Overton, ACM TOMS 7, 1981) and shrunk to its leading Ritz vectors when it is full (thick restart: Wu and Simon, SIAM J.
Matrix Anal. Appl. 22, 2000), so the projected eigenproblem stays small whatever the matrix. Products with W and the
basis run in W's dtype, all that is small in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .angles import ZERO_LEVEL, cut_bounds, moved
from .exact import Subspace, gram_subspace
from .orthonormal import orthonormalize_rows
from .precision import multiply_rows
from .probes import START, probes

# Steps between two checks. The schedule is fixed, so a matrix gets the same basis whatever else is in its batch.
_CYCLE = 3
# Blocks that the basis holds beyond the vectors that survive a restart. Keeping the whole space instead saves one or
# two steps of 24, but its eigenproblems then cost more than the products.
_ROOM = 6
# The estimate extrapolates how far the subspace moved between two checks; the factor covers irregular convergence.
_DRIFT_SAFETY = 3.0
# Rounding turns the subspace by about eps / gap of σ² times (products) 4 σ_r ‖W‖_F/√n and (projection) 0.3 σ_1²/√n:
# an upper estimate of what spectra with and without spikes showed in fp32. Ten times the tolerance is hopeless.
_ROUNDING_PRODUCT, _ROUNDING_PROJECTION = 4.0, 0.3
_HOPELESS = 10.0


def block_size(device: torch.device) -> int:
    """Vectors per step: few keep the flops low on a CPU (measured), more spare a GPU passes over W (modelled)."""
    return 16 if device.type == "cpu" else 32


class _Krylov:
    """A basis of the Krylov space of a batch of matrices and the projection of their Gram matrices on it."""

    def __init__(self, short: Tensor, block: int, capacity: int, seed: int) -> None:
        batch, n, _ = short.shape
        self.short = short
        self.rows = short.new_empty(batch, capacity, n)
        self.projected = torch.zeros(batch, capacity, capacity, dtype=torch.float64, device=short.device)
        start = probes(block, n, START, seed=seed, device=short.device, dtype=short.dtype)
        self.rows[:, :block] = orthonormalize_rows(start)
        # Rows previous…last couple to the residual of the last block, which is rows last…width.
        self.previous, self.last, self.width, self.step = 0, 0, block, 0
        self.tail: Tensor | None = None

    def multiply(self) -> None:
        """Apply the Gram matrix to the last block and project: what remains is orthogonal to the whole basis."""
        lo, hi = self.last, self.width
        image = multiply_rows(multiply_rows(self.rows[:, lo:hi], self.short), self.short.mT)
        diagonal = self.rows[:, lo:hi] @ image.mT
        self.projected[:, lo:hi, lo:hi] = 0.5 * (diagonal + diagonal.mT)
        recent = slice(self.previous, hi)
        self.residual = image - self.projected[:, lo:hi, recent].to(image.dtype) @ self.rows[:, recent]
        self.step += 1

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values in descending order, the coefficients of their vectors, and the squared residual norms."""
        values, vectors = torch.linalg.eigh(self.projected[:, : self.width, : self.width])
        values, vectors = values.flip(-1).clamp_min(0.0), vectors.flip(-1)
        tail = vectors[:, self.last :]
        gram = self.residual.double() @ self.residual.double().mT
        return values, vectors, (tail * (gram @ tail)).sum(-2).clamp_min(0.0)

    def keep(self, index: Tensor) -> None:
        """Go on with some of the matrices only."""
        self.short, self.residual = self.short[index], self.residual[index]
        self.rows, self.projected = self.rows[index], self.projected[index]

    def restart(self, values: Tensor, vectors: Tensor) -> None:
        """Replace the basis by the given Ritz vectors; all of them couple to the block that comes next."""
        count = vectors.shape[-1]
        self.rows[:, :count] = vectors.mT.to(self.rows.dtype) @ self.rows[:, : self.width]
        self.projected.zero_()
        self.projected[:, :count, :count] = torch.diag_embed(values)
        self.tail = vectors[:, self.last : self.width]
        self.previous, self.last, self.width = 0, 0, count

    def extend(self) -> None:
        """Orthonormalise what remains, against the whole basis too, and append it."""
        lo, hi = self.last, self.width
        basis = self.rows[:, :hi]
        block = orthonormalize_rows(self.residual)
        block = orthonormalize_rows(block - (block @ basis.mT) @ basis)
        coupling = (block @ self.residual.mT).double()
        if self.tail is not None:
            coupling, self.tail = coupling @ self.tail, None
        end = hi + block.shape[1]
        self.rows[:, hi:end] = block
        self.projected[:, hi:end, lo:hi] = coupling
        self.projected[:, lo:hi, hi:end] = coupling.mT
        self.previous, self.last, self.width = lo, hi, end


def lanczos_subspace(
    short: Tensor, rank: int, n_oversamples: int, tol: float, max_iter: int, seed: int, block: int
) -> Subspace:
    """Top singular vectors of the shorter side, iterated until the estimated subspace error meets `tol`.

    A matrix for which the vectors drawn would outnumber half of its side is decomposed completely instead. At least as
    many steps are made as it takes to hold twice the rank. Where rounding in W's dtype alone exceeds `tol`, iteration
    ends once the rest of the error has met it, or at once where rounding exceeds it tenfold.

    Args:
        short: [b, n, m] with n ≤ m, entries of moderate size.
        rank: vectors wanted.
        n_oversamples: Ritz vectors beyond the rank that survive a restart.
        tol: target of the sine of the largest angle at the cut.
        max_iter: bound on the steps.
        seed: of the starting block.
        block: vectors per step.
    """
    batch, n, _ = short.shape
    check = max(_CYCLE, -(-2 * rank // block) + 1)
    survivors = rank + n_oversamples
    capacity = max(check * block, survivors + _ROOM * block)
    if 2 * capacity > n:
        return gram_subspace(short, rank)
    final = max(max_iter, check)
    result = Subspace(
        short.new_empty(batch, rank, n),
        torch.zeros(batch, 1, dtype=torch.float64, device=short.device),
        torch.full((batch, rank), torch.inf, dtype=torch.float64, device=short.device),
        torch.zeros(batch, dtype=torch.int64, device=short.device),
    )
    eps = torch.finfo(short.dtype).eps
    scale = torch.linalg.vector_norm(short, dim=(-2, -1)).double()[:, None]
    krylov = _Krylov(short, block, capacity, seed)
    place = torch.arange(batch, device=short.device)
    before: tuple[Tensor, Tensor] | None = None
    while True:
        krylov.multiply()
        if krylov.step < min(check, final):
            krylov.extend()
            continue
        check += _CYCLE
        values, vectors, squares = krylov.ritz()
        zero = (ZERO_LEVEL * eps) ** 2 * values[:, :1]
        drift, gaps = cut_bounds(values[:, :rank], values[:, rank : rank + 1], zero, squares[:, :rank])
        residual = squares[:, :rank].cumsum(-1).sqrt()
        if before is not None:
            shrink = (residual / before[1].clamp_min(1e-300)).clamp_max(1.0)
            drift = torch.minimum(drift, _DRIFT_SAFETY * shrink * moved(vectors, before[0]))
        products = _ROUNDING_PRODUCT * scale * values[:, :rank].sqrt()
        rounding = eps / n**0.5 * (products + _ROUNDING_PROJECTION * values[:, :1]) / gaps
        stop = (drift[:, -1] <= tol) | (rounding[:, -1] > _HOPELESS * tol) | (krylov.step == final)
        ended, going = stop.nonzero()[:, 0], (~stop).nonzero()[:, 0]
        if len(ended):
            chosen = vectors[ended, :, :rank].mT.to(short.dtype)
            result.basis[place[ended]] = chosen @ krylov.rows[ended, : krylov.width]
            result.rest[place[ended]] = values[ended, rank : rank + 1].sqrt()
            result.drift[place[ended]] = drift[ended] + rounding[ended]
            result.steps[place[ended]] = krylov.step
        if len(going) == 0:
            return result
        place, scale, values, vectors = place[going], scale[going], values[going], vectors[going]
        if 2 * (krylov.step + 1) * block > n:
            complete = gram_subspace(krylov.short[going], rank)
            result.basis[place], result.rest[place] = complete.basis.to(short.dtype), complete.rest[:, :1]
            return result
        if len(ended):
            krylov.keep(going)
        before = vectors[..., :rank], residual[going]
        if krylov.width + _CYCLE * block > capacity:
            krylov.restart(values[:, :survivors], vectors[..., :survivors])
            # The leading Ritz vectors are the first rows of the basis now.
            leading = torch.eye(survivors, rank, dtype=torch.float64, device=short.device)
            before = leading.expand(len(place), -1, -1), residual[going]
        krylov.extend()
