"""Complete decompositions, for small matrices, large ranks, and choices of vectors other than the top ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraxs_ext.ops.philox import random_u32

from .orthonormal import orthonormalize_rows
from .probes import PERMUTATION
from .recipe import Vectors

_eigh = torch.ops.loraxs._eigh.default


class Subspace(NamedTuple):
    """Leading singular vectors of one side, before the last products.

    Attributes:
        basis: [b, r, n] orthonormal rows, n the side they were asked for.
        rest: [b, q] estimates of singular values that are not among those of `basis`.
        drift: [b, r] estimated sine of the largest angle of each leading part; +inf where there is no estimate.
        steps: [b] number of iterations made, 0 for a complete decomposition.
    """

    basis: Tensor
    rest: Tensor
    drift: Tensor
    steps: Tensor


def empty_subspace(matrices: Tensor, rank: int) -> Subspace:
    """Room for the results of an iteration on `matrices` [b, n, m], to be filled in matrix by matrix."""
    batch, n, _ = matrices.shape
    return Subspace(
        matrices.new_empty(batch, rank, n),
        torch.zeros(batch, 1, dtype=torch.float64, device=matrices.device),
        torch.full((batch, rank), torch.inf, dtype=torch.float64, device=matrices.device),
        torch.zeros(batch, dtype=torch.int64, device=matrices.device),
    )


def gram_subspace(matrices: Tensor, rank: int) -> Subspace:
    """Top singular vectors from the complete fp64 eigendecomposition of the smaller Gram matrix.

    Resolves σ_i/σ_1 down to 1e-7, all that an fp32 matrix holds.

    Args:
        matrices: [b, n, m]; the vectors are those of length n.
        rank: vectors wanted.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        found = gram_subspace(matrices.mT, rank)
        return found._replace(basis=orthonormalize_rows(found.basis @ matrices.mT.double()))
    wide = matrices.double()
    values, columns = _eigh(wide @ wide.mT)
    sigma = values.flip(-1).clamp_min(0.0).sqrt()
    unknown = torch.full_like(sigma[:, :rank], torch.inf)
    steps = torch.zeros(len(matrices), dtype=torch.int64, device=matrices.device)
    return Subspace(columns.flip(-1)[..., :rank].mT, sigma[:, rank:], unknown, steps)


def vector_order(count: int, vectors: Vectors, seed: int) -> Tensor:
    """Indices into descending singular values in the order in which they are taken; ranks are nested by it.

    Args:
        count: number of singular values.
        vectors: "top" from the largest down, "bottom" from the smallest up, "middle" outward from the centre,
            "random" a permutation fixed by `seed`.
        seed: 64-bit seed.

    Returns:
        int64 [count] on the CPU.
    """
    index = torch.arange(count)
    if vectors == "bottom":
        return index.flip(0)
    if vectors == "middle":
        return torch.argsort((2 * index - (count - 1)).abs(), stable=True)
    if vectors == "random":
        return torch.argsort(random_u32(1, count, seed, PERMUTATION)[0], stable=True)
    return index


def full_svd(W: Tensor, rank: int, vectors: Vectors, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Any choice of singular vectors from a complete fp64 SVD, which does not square the condition.

    Args:
        W: [b, N, K].
        rank: number of vectors.
        vectors, seed: as in `vector_order`.

    Returns:
        Orthonormal rows [b, rank, N] and [b, rank, K], and the singular values [b, min(N, K) − rank] not chosen.
    """
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    order = vector_order(S.shape[-1], vectors, seed).to(W.device)
    return U.mT[:, order[:rank]], Vh[:, order[:rank]], S[:, order[rank:]]
