"""Block Lanczos: the top singular vectors of large matrices with few products, stopped by a measured error.

A basis of the block Krylov space of the Gram matrix M = W Wᵀ is kept orthonormal against all of itself (Golub, Luk,
Overton, ACM TOMS 7, 1981) and shrunk to its leading Ritz vectors when it is full (thick restart: Wu and Simon, SIAM J.
Matrix Anal. Appl. 22, 2000), so the projected eigenproblem stays small whatever the matrix. Products with W and the
basis run in W's dtype, all that is small in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .angles import ZERO_LEVEL, converged, cut_bounds, ritz_angle, rounding_angle
from .exact import Subspace, empty_subspace, gram_subspace
from .orthonormal import orthonormalize_rows
from .precision import gram_rows
from .probes import START, probes

# Steps to make at least, vectors before the first look at the error, and steps between two looks while the speed of
# convergence is not known.
_LEAST_STEPS, _FIRST_VECTORS, _CYCLE = 3, 40, 2
# Blocks that the basis holds beyond the vectors that survive a restart. Keeping the whole space instead saves one or
# two steps of 24, but its eigenproblems then cost more than the products.
_ROOM = 6
# How far a block of the basis may be from orthonormal, in eps.
_NEGLIGIBLE = 0.1
# A space of few vectors knows little of the spectrum behind the cut: true errors reached 2.2 times the bare estimate at
# tolerances below 0.1 (960 runs over flat, clustered and spiked spectra).
_SAFETY = 3.0


def block_size(device: torch.device, rank: int) -> int:
    """Vectors per step: few keep the flops low on a CPU (measured), more spare a GPU passes over W (modelled)."""
    if device.type != "cpu":
        return 32
    return 8 if rank <= 8 else 16


class _Krylov:
    """A basis of the Krylov space of a batch of matrices and the projection of their Gram matrices on it."""

    def __init__(self, stack: Tensor, block: int, capacity: int, seed: int) -> None:
        batch, n, _ = stack.shape
        # One by one on a CPU: its products gain nothing by a batch, and a matrix is never copied to be kept.
        self.matrices = list(stack.split(1)) if stack.device.type == "cpu" else [stack]
        self.rows = stack.new_empty(batch, capacity, n)
        self.projected = torch.zeros(batch, capacity, capacity, dtype=torch.float64, device=stack.device)
        start = probes(block, n, START, seed=seed, device=stack.device, dtype=stack.dtype)
        self.rows[:, :block] = orthonormalize_rows(start)
        # Rows previous…last couple to the residual of the last block, which is rows last…width.
        self.previous, self.last, self.width, self.step = 0, 0, block, 0
        self.tail: Tensor | None = None

    def multiply(self) -> None:
        """Apply the Gram matrix to the last block and project: what remains is orthogonal to the whole basis."""
        lo, hi = self.last, self.width
        blocks = self.rows[:, lo:hi].split([len(matrix) for matrix in self.matrices])
        image = torch.cat([gram_rows(rows, matrix) for rows, matrix in zip(blocks, self.matrices, strict=True)])
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

    def keep(self, index: list[int]) -> None:
        """Go on with some of the matrices only."""
        self.matrices = self.choose(index)
        self.rows, self.projected, self.residual = self.rows[index], self.projected[index], self.residual[index]

    def choose(self, index: list[int]) -> list[Tensor]:
        """Some of the matrices."""
        each = len(self.matrices) == len(self.rows)
        return [self.matrices[i] for i in index] if each else [self.matrices[0][index]]

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
        overlap = block @ basis.mT
        block = block - overlap @ basis
        # What was taken away leaves the block orthonormal up to its square.
        large = overlap.abs().amax((-2, -1)).square() > _NEGLIGIBLE * torch.finfo(block.dtype).eps
        if bool(large.any()):
            block = torch.where(large[:, None, None], orthonormalize_rows(block), block)
        coupling = (block @ self.residual.mT).double()
        if self.tail is not None:
            coupling, self.tail = coupling @ self.tail, None
        end = hi + block.shape[1]
        self.rows[:, hi:end] = block
        self.projected[:, hi:end, lo:hi] = coupling
        self.projected[:, lo:hi, hi:end] = coupling.mT
        self.previous, self.last, self.width = lo, hi, end


def lanczos_subspace(
    matrices: Tensor, rank: int, n_oversamples: int, tol: float, max_iter: int, seed: int, block: int
) -> Subspace:
    """Top singular vectors of one side, iterated until the estimated subspace error meets `tol`.

    A matrix for which the vectors drawn would outnumber half of its shorter side is decomposed completely instead. At
    least as many steps are made as it takes to hold twice the rank. Where rounding in W's dtype alone exceeds `tol`,
    iteration ends once the rest of the error has met it, or at once where rounding exceeds it tenfold.

    Args:
        matrices: [b, n, m], entries of moderate size; the vectors are those of length n.
        rank: vectors wanted.
        n_oversamples: Ritz vectors beyond the rank that survive a restart.
        tol: target of the sine of the largest angle at the cut.
        max_iter: bound on the steps.
        seed: of the starting block.
        block: vectors per step.
    """
    batch, side = len(matrices), min(matrices.shape[1:])
    least = max(_LEAST_STEPS, -(-2 * rank // block) + 1)
    first = max(least, -(-_FIRST_VECTORS // block))
    survivors = rank + n_oversamples
    capacity = max(first * block, survivors + _ROOM * block)
    if 2 * capacity > side:
        return gram_subspace(matrices, rank)
    final = max(max_iter, least)
    dtype = matrices.dtype
    eps = torch.finfo(dtype).eps
    result = empty_subspace(matrices, rank)
    scale = torch.linalg.vector_norm(matrices, dim=(-2, -1)).double()
    krylov = _Krylov(matrices, block, capacity, seed)
    place = torch.arange(batch, device=matrices.device)
    schedule = [_Schedule(min(first, final), tol) for _ in range(batch)]
    while True:
        krylov.multiply()
        full = krylov.width + block > capacity
        if not full and krylov.step < final and all(krylov.step < entry.next for entry in schedule):
            krylov.extend()
            continue
        values, vectors, squares = krylov.ritz()
        zero = (ZERO_LEVEL * eps) ** 2 * values[:, :1]
        drift, gap = ritz_angle(values, squares, rank, zero, _SAFETY)
        rounding = rounding_angle(values[:, :rank], scale, gap, dtype, side)
        looked_at = [full or krylov.step >= entry.next for entry in schedule]
        done = zip(converged(drift, rounding, tol).tolist(), drift.tolist(), schedule, strict=True)
        stop = [krylov.step >= final or entry.due(krylov.step, error, met) for met, error, entry in done]
        ended = [i for i, flag in enumerate(stop) if flag]
        costly = 2 * (krylov.step + 1) * block > side
        given_up = [i for i, flag in enumerate(stop) if not flag and costly and looked_at[i]]
        going = [i for i, flag in enumerate(stop) if not flag and not (costly and looked_at[i])]
        if ended:
            bounds, _ = cut_bounds(values[:, :rank], values[:, rank:], zero, squares[:, :rank])
            bounds[:, -1] = drift
            where = place[ended]
            result.basis[where] = vectors[ended, :, :rank].mT.to(dtype) @ krylov.rows[ended, : krylov.width]
            result.rest[where] = values[ended, rank : rank + 1].sqrt()
            result.drift[where] = (bounds + rounding[:, None])[ended]
            result.steps[where] = krylov.step
        if given_up:
            complete, where = gram_subspace(torch.cat(krylov.choose(given_up)), rank), place[given_up]
            result.basis[where], result.rest[where] = complete.basis.to(dtype), complete.rest[:, :1]
        if not going:
            return result
        if len(going) < len(stop):
            place, scale, values, vectors = place[going], scale[going], values[going], vectors[going]
            schedule = [schedule[i] for i in going]
            krylov.keep(going)
        if full:
            krylov.restart(values[:, :survivors], vectors[..., :survivors])
        krylov.extend()


class _Schedule:
    """When to look at one matrix again: an eigenproblem costs as much as a few products, so not after every step.

    It knows nothing of the other matrices of a batch, so a matrix gets the same basis whatever else is there.
    """

    def __init__(self, first: int, tol: float) -> None:
        self.next, self.tol = first, tol
        self.seen = 0, math.inf

    def due(self, step: int, error: float, met: bool) -> bool:
        """Whether the matrix is finished; if not, plans the next look from the speed of convergence so far."""
        if step < self.next:
            return False
        ahead = _CYCLE
        before, larger = self.seen
        if error < larger < math.inf:
            speed = math.log(larger / error) / (step - before)
            # Convergence accelerates, so the first step that may have reached the tolerance is a bit earlier.
            ahead = max(1, min(2 * _CYCLE, math.floor(math.log(max(error / self.tol, 1.0)) / speed)))
        self.seen, self.next = (step, error), step + ahead
        return met
