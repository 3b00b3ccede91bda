"""Orthonormal bases, as columns or as rows: the op `loraxs::orthonormalize` for any leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from loraxs_ext.ops import orthonormal

_orthonormalize = torch.ops.loraxs.orthonormalize.default


def orthonormalize_rows(Y: Tensor) -> Tensor:
    """Orthonormal rows that span, for every i, what the first i rows of Y span; see `orthonormalize`.

    Args:
        Y: [..., k, n] of a float type with k ≤ n, finite.

    Returns:
        [..., k, n] in Y's dtype, or fp32 for half types.
    """
    # Where the op is plain torch, its dispatch and checks would cost a Lanczos step as much as the work.
    if Y.device.type != "cuda":
        return orthonormal.orthonormalize_rows(Y)
    return _orthonormalize(Y.reshape(-1, *Y.shape[-2:]).mT).mT.reshape(Y.shape)


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal columns that span, for every i, what the first i columns of Y span.

    Args:
        Y: [..., n, k] of a float type with k ≤ n, finite; columns may be dependent or zero (they are completed).

    Returns:
        [..., n, k] in Y's dtype, or fp32 for half types; QᵀQ = I to 3e-7 (fp32) or 1e-14 (fp64).

    Raises:
        ValueError: k > n, or, on a CPU, NaN or Inf among the entries.
    """
    flat = Y.reshape(-1, *Y.shape[-2:]) if Y.numel() else Y.new_zeros(0, *Y.shape[-2:])
    return _orthonormalize(flat).reshape(Y.shape)
