"""Orthonormal bases by Cholesky factorisation of an fp64 Gram matrix: products and small triangles only.

Householder QR loops over the batch on CUDA; CholeskyQR (Fukaya et al., "Shifted Cholesky QR", SIAM J. Sci. Comput.
42, 2020) is all GEMM. With the Gram matrix in fp64 one pass serves an fp32 block of condition up to 1e3, and worse
ones are repeated until they are orthonormal.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import contract as contract
from .probes import COMPLETION, probes

_MAX_PASSES = 8
# A pass whose smallest squared pivot is p leaves an orthogonality error of about 2e-16 / p. The limits leave 2e-10
# for results that are rounded to fp32 or less, and a few ulp for fp64.
_PIVOT_FP32 = 1e-6
_PIVOT_FP64 = 0.25
# Up to here the compiled first pass is faster than calls of LAPACK on the CPU: 17 against 51 µs for 8 × 1024, 61
# against 70 for 16 × 1024, and slower from 25 rows on.
COMPILED_ROWS = 16

_cholesky_qr = torch.ops.loraxs._cholesky_qr.default


def orthonormalize_rows(Y: Tensor) -> Tensor:
    """Orthonormal rows that span, for every i, what the first i rows of Y span.

    Rows that depend on earlier ones are replaced by deterministic vectors orthogonal to all others.

    Args:
        Y: [..., k, n] of a float type with k ≤ n, finite.

    Returns:
        [..., k, n] in Y's dtype, or fp32 for half types; Q Qᵀ = I to 1e-7 (fp32) or 1e-14 (fp64).

    Raises:
        ValueError: NaN or Inf among the entries.
    """
    result = torch.float64 if Y.dtype == torch.float64 else torch.float32
    if Y.numel() == 0:
        return Y.to(result)
    limit = _PIVOT_FP64 if result == torch.float64 else _PIVOT_FP32
    if Y.dtype == torch.float32 and Y.device.type == "cpu" and Y.shape[-2] <= COMPILED_ROWS and _is_compiled():
        Q, pivots = _cholesky_qr(Y.reshape(-1, *Y.shape[-2:]))
        Q, good = Q.reshape(Y.shape), (pivots >= limit).reshape(Y.shape[:-2])
        if not bool(good.all()):
            Q = torch.where(good[..., None, None], Q, _orthonormalize_hard(Y.double(), limit).to(result))
        return Q
    Q = Y.double()
    gram = Q @ Q.mT
    lower, info = torch.linalg.cholesky_ex(gram)
    # Squared pivots over squared lengths; a zero or not finite row makes this NaN, which is not good.
    pivots = lower.diagonal(dim1=-2, dim2=-1).square() / gram.diagonal(dim1=-2, dim2=-1)
    good = (pivots.amin(-1) >= limit) & (info == 0)
    Q = torch.linalg.solve_triangular(lower, Q, upper=False)
    if not bool(good.all()):
        Q = torch.where(good[..., None, None], Q, _orthonormalize_hard(Y.double(), limit))
    return Q.to(result)


@cache
def _is_compiled() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("loraxs::_cholesky_qr", "CPU")


def _orthonormalize_hard(Q: Tensor, limit: float) -> Tensor:
    """The same for ill-conditioned, dependent and zero rows: repeated passes, shifted while the Gram is singular."""
    if not bool(torch.isfinite(Q).all()):
        raise ValueError("Y contains NaN or Inf")
    count, length = Q.shape[-2:]
    eye = torch.eye(count, dtype=Q.dtype, device=Q.device)
    # The smallest shift that is certain to make the factorisation succeed (Fukaya et al., section 3).
    shift = 11.0 * torch.finfo(Q.dtype).eps * (length * count + count * (count + 1))
    stand_in = probes(count, length, COMPLETION, device=Q.device, dtype=Q.dtype)
    Q = _unit_rows(Q, stand_in)
    done = torch.zeros(Q.shape[:-2], dtype=torch.bool, device=Q.device)
    for _ in range(_MAX_PASSES):
        gram = Q @ Q.mT
        lower, info = torch.linalg.cholesky_ex(gram)
        singular = (info > 0)[..., None, None]
        shifted = torch.linalg.cholesky(torch.where(singular, gram + shift * eye, eye))
        lower = torch.where(singular, shifted, lower)
        pivots = lower.diagonal(dim1=-2, dim2=-1).square()[..., None]
        # A row that all but vanishes is rounding noise of the rows before it: it gets a direction of its own.
        lost = singular & (pivots < 4.0 * shift)
        step = _unit_rows(torch.where(lost, 0.0, torch.linalg.solve_triangular(lower, Q, upper=False)), stand_in)
        Q = torch.where(done[..., None, None], Q, step)
        done = done | ((info == 0) & (pivots.amin((-2, -1)) >= limit))
        if bool(done.all()):
            return Q
    raise RuntimeError(f"Y could not be orthonormalised in {_MAX_PASSES} passes")


def _unit_rows(rows: Tensor, stand_in: Tensor) -> Tensor:
    """Rows scaled to length 1; rows of length 0 are replaced by those of `stand_in`."""
    peak = rows.abs().amax(-1, keepdim=True)
    rows = torch.where(peak > 0, rows / peak, stand_in)
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
