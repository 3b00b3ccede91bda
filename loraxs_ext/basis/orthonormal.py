"""Orthonormal bases by Cholesky factorisation of an fp64 Gram matrix: products and small triangles only.

Householder QR loops over the batch on CUDA; CholeskyQR (Fukaya et al., "Shifted Cholesky QR", SIAM J. Sci. Comput.
42, 2020) is all GEMM. With the Gram matrix in fp64 one pass serves an fp32 block of condition up to 1e5, and worse
ones are repeated until they are orthonormal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .probes import COMPLETION, probes

_MAX_PASSES = 8
# A pass whose smallest squared pivot is p leaves an orthogonality error of about 2e-16 / p. The limits leave 2e-10
# for results that are rounded to fp32 or less, and a few ulp for fp64.
_PIVOT_FP32 = 1e-6
_PIVOT_FP64 = 0.25


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor of unit-diagonal Gram matrices, shifted where they are numerically singular, and those places."""
    lower, info = torch.linalg.cholesky_ex(gram)
    singular = info > 0
    if bool(singular.any()):
        # The smallest shift that is certain to make the factorisation succeed (Fukaya et al., equation 3.9).
        shift = 11.0 * torch.finfo(gram.dtype).eps * gram.shape[-1] * (gram.shape[-1] + 1)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        shifted = torch.linalg.cholesky(torch.where(singular[..., None, None], gram + shift * eye, eye))
        lower = torch.where(singular[..., None, None], shifted, lower)
    return lower, singular


def _unit_rows(rows: Tensor, stand_in: Tensor) -> Tensor:
    """Rows scaled to length 1; rows of length 0 are replaced by those of `stand_in`."""
    peak = rows.abs().amax(-1, keepdim=True)
    rows = torch.where(peak > 0, rows / peak, stand_in)
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def orthonormalize_rows(Y: Tensor) -> Tensor:
    """Orthonormal rows that span, for every i, what the first i rows of Y span.

    Rows that depend on earlier ones are replaced by deterministic vectors orthogonal to all others.

    Args:
        Y: [..., k, n] of a float type with k ≤ n, finite.

    Returns:
        [..., k, n] in Y's dtype, or fp32 for half types; Q Qᵀ = I to 1e-7 (fp32) or 1e-14 (fp64).

    Raises:
        ValueError: k > n.
    """
    count, length = Y.shape[-2:]
    if count > length:
        raise ValueError(f"Y must have no more vectors than their length, got {count} of length {length}")
    result = torch.float64 if Y.dtype == torch.float64 else torch.float32
    if Y.numel() == 0:
        return Y.to(result)
    limit = _PIVOT_FP64 if Y.dtype == torch.float64 else _PIVOT_FP32
    stand_in = probes(count, length, COMPLETION, device=Y.device, dtype=torch.float64)
    Q = _unit_rows(Y.double(), stand_in)
    done = torch.zeros(Y.shape[:-2], dtype=torch.bool, device=Y.device)
    for attempt in range(_MAX_PASSES):
        lower, singular = _cholesky(Q @ Q.mT)
        pivot = lower.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        step = torch.linalg.solve_triangular(lower, Q, upper=False)
        # A row that vanished under the shift is noise: give it a direction of its own for the next pass.
        lost = singular[..., None, None] & (torch.linalg.vector_norm(step, dim=-1, keepdim=True) < 0.5)
        step = _unit_rows(torch.where(lost, stand_in, step), stand_in)
        Q = torch.where(done[..., None, None], Q, step)
        done = done | (~singular & (pivot >= limit))
        if bool(done.all()):
            return Q.to(result)
        stand_in = stand_in.roll(attempt + 1, -1)
    raise RuntimeError(f"Y could not be orthonormalised in {_MAX_PASSES} passes; are its entries finite?")


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal columns that span, for every i, what the first i columns of Y span.

    Args:
        Y: [..., n, k] of a float type with k ≤ n, finite; columns may be dependent or zero (they are completed).

    Returns:
        [..., n, k] in Y's dtype, or fp32 for half types; QᵀQ = I to 1e-7 (fp32) or 1e-14 (fp64).

    Raises:
        ValueError: k > n.
    """
    return orthonormalize_rows(Y.mT).mT
