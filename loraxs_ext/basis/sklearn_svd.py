"""The basis of the LoRA-XS reference code, which is not the truncated SVD but a few power iterations towards it.

The reference calls scikit-learn's TruncatedSVD(n_components=r, n_iter=10, random_state=42) on X = Wᵀ. On a weight whose
spectrum decays slowly that has not converged, so an R trained on its basis belongs to that very start and number of
iterations. scikit-learn normalises by LU between products; orthonormal rows span the same and lose less to rounding.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .orthonormal import orthonormalize_rows
from .precision import multiply_rows
from .recipe import SklearnSigns

_eigh = torch.ops.loraxs._eigh.default

_OVERSAMPLES = 10


@functools.lru_cache(maxsize=16)
def _start(side: int, count: int, seed: int) -> Tensor:
    """[count, side] fp64: the transpose of what scikit-learn draws for X of smaller side `side`."""
    return torch.from_numpy(np.random.RandomState(seed).normal(size=(side, count))).T.contiguous()


def sklearn_left_vectors(W: Tensor, rank: int, n_iter: int, random_state: int) -> tuple[Tensor, Tensor]:
    """What the reference takes for left singular vectors: `components_` of TruncatedSVD on Wᵀ, up to signs.

    Args:
        W: [b, N, K], fp32 or fp64.
        rank: between 1 and min(N, K).
        n_iter, random_state: of TruncatedSVD, an int each.

    Returns:
        Orthonormal rows [b, rank, N], and the other Ritz values [b, ≤ 10] of σ.
    """
    N, K = W.shape[-2:]
    # scikit-learn iterates on the smaller side of X = Wᵀ; for square matrices on that of X's columns, which is N.
    short = W if N <= K else W.mT
    start = _start(min(N, K), rank + _OVERSAMPLES, random_state)
    rows = start.to(W.device, W.dtype)[: min(N, K)].expand(len(W), -1, -1)
    for _ in range(n_iter):
        rows = orthonormalize_rows(multiply_rows(rows, short))
        rows = orthonormalize_rows(multiply_rows(rows, short.mT))
    rows = orthonormalize_rows(multiply_rows(rows, short))
    image = multiply_rows(rows, short.mT).double()
    values, rotation = _eigh(image @ image.mT)
    left = rotation.flip(-1).mT @ (image if short is W else rows.double())
    return orthonormalize_rows(left[:, :rank]).to(W.dtype), values.flip(-1).clamp_min(0.0).sqrt()[:, rank:]


def sklearn_signs(left: Tensor, projected: Tensor, rule: SklearnSigns) -> Tensor:
    """±1 that make the largest entry of each row of A, or of each column of B, positive.

    Args:
        left: [b, r, N], Uᵀ.
        projected: [b, r, K], UᵀW.
        rule: which of the two.

    Returns:
        [b, r, 1] in left's dtype.
    """
    rows = projected if rule == "rows of A" else left
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
