"""Symmetric matrices with every spectrum that is awkward, and what a solution of them has to satisfy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_DOUBLE = torch.float64


def _gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=_DOUBLE)


def symmetric(batch: int, n: int) -> Tensor:
    """[batch, n, n] of Gaussian numbers: values of both signs."""
    A = _gaussian(batch, n, n)
    return A + A.mT


def gram(batch: int, n: int, m: int) -> Tensor:
    """[batch, n, n] Gram matrices of n rows of length m; of rank m if that is less."""
    Y = _gaussian(batch, n, m)
    return Y @ Y.mT


def with_values(values: Tensor) -> Tensor:
    """[1, n, n] with these eigenvalues and random eigenvectors."""
    Q = torch.linalg.qr(_gaussian(1, len(values), len(values))).Q
    A = (Q * values.to(_DOUBLE)) @ Q.mT
    return 0.5 * (A + A.mT)


def near_diagonal(batch: int, n: int) -> Tensor:
    """What Rayleigh–Ritz makes after a filter: distinct values on the diagonal, and little beside it."""
    return torch.diag_embed(torch.linspace(1, 0, n, dtype=_DOUBLE).expand(batch, n)) + 1e-5 * symmetric(batch, n)


MATRICES: Mapping[str, Callable[[], Tensor]] = {
    "1 × 1": lambda: symmetric(2, 1),
    "2 × 2": lambda: symmetric(3, 2),
    "both signs, odd": lambda: symmetric(1, 13),
    "Gram": lambda: gram(1, 12, 40),
    "rank deficient": lambda: gram(1, 11, 3),
    "rank 1, negative": lambda: -gram(1, 9, 1),
    "zero": lambda: torch.zeros(1, 7, 7, dtype=_DOUBLE),
    "identity": lambda: torch.eye(8, dtype=_DOUBLE)[None],
    "multiple": lambda: with_values(torch.tensor([2.0] * 5 + [-2.0] * 4 + [0.0] * 3)),
    "cluster": lambda: with_values(1 + 1e-12 * torch.arange(10, dtype=_DOUBLE)),
    "17 orders": lambda: with_values(torch.logspace(0, -16, 12)),
    "1e-290": lambda: 1e-290 * symmetric(1, 6),
    "1e290": lambda: 1e290 * symmetric(1, 6),
}


def assert_solves(A: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Ascending values within a few ulp of ‖A‖ of LAPACK's, VᵀV = I to 1e-13, A V = V Λ to ulps of ‖A‖."""
    assert (values.shape, vectors.shape) == (A.shape[:-1], A.shape)
    assert values.dtype == vectors.dtype == torch.float64
    peak = A.abs().amax((-2, -1)).clamp_min(1e-300)
    A, values = A / peak[:, None, None], values / peak[:, None]
    exact = torch.linalg.eigvalsh(A)
    ulp = torch.finfo(torch.float64).eps * exact.abs().amax(-1)
    assert bool((values.diff(dim=-1) >= 0).all())
    assert bool(((values - exact).abs().amax(-1) <= 32 * ulp).all())
    eye = torch.eye(A.shape[-1], dtype=torch.float64)
    assert float((vectors.mT @ vectors - eye).abs().max()) < 1e-13
    residual = torch.linalg.vector_norm(A @ vectors - vectors * values[:, None], dim=-2).amax(-1)
    assert bool((residual <= 64 * ulp).all())
