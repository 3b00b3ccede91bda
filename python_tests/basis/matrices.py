"""Weights with known spectra, and the true subspaces to compare with."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _frame(n: int, k: int, seed: int) -> Tensor:
    """[n, k] orthonormal columns."""
    return torch.linalg.qr(gaussian(n, k, seed=seed).double()).Q


def with_spectrum(N: int, K: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """fp64 [N, K] with the given singular values, min(N, K) or fewer of them."""
    k = len(sigma)
    return (_frame(N, k, seed) * sigma.double()) @ _frame(K, k, seed + 1).mT


def power_law(N: int, K: int, exponent: float, seed: int = 0) -> Tensor:
    return with_spectrum(N, K, torch.arange(1, min(N, K) + 1) ** -exponent, seed)


def spiked(N: int, K: int, spikes: int = 20, seed: int = 0) -> Tensor:
    """A flat bulk with decaying spikes above it: a caricature of a trained transformer weight."""
    edge = (1 + math.sqrt(min(N, K) / max(N, K))) * 3.0
    noise = gaussian(N, K, seed=seed + 7).double() / math.sqrt(max(N, K))
    return noise + with_spectrum(N, K, edge * torch.arange(1, spikes + 1) ** -0.6, seed)


@functools.cache
def tied() -> Tensor:
    """600 × 640 with 8 + 40 + 552 equal singular values: a cut at 25 falls inside a cluster."""
    return with_spectrum(600, 640, torch.cat([torch.full((8,), 2.0), torch.full((40,), 1.0), torch.full((552,), 0.3)]))


CASES = {
    "small tall": lambda: gaussian(96, 64),
    "small wide": lambda: gaussian(64, 96),
    "rank fraction": lambda: gaussian(70, 17),
    "tall": lambda: power_law(900, 640, 0.5),
    "wide": lambda: power_law(640, 900, 0.5),
    "spiked": lambda: spiked(640, 640),
    "rank 5": lambda: gaussian(600, 5) @ gaussian(5, 640, seed=1),
    "small rank 5": lambda: gaussian(64, 5) @ gaussian(5, 96, seed=1),
    "zero": lambda: torch.zeros(64, 80),
    "large zero": lambda: torch.zeros(640, 600),
    "identity": lambda: torch.eye(640),
    "tied": tied,
    "one column": lambda: gaussian(1, 40).expand(16, 40),
}


def subspace_sine(computed: Tensor, W: Tensor, rank: int) -> float:
    """Sine of the largest angle between span of the columns of `computed` [N, r] and the top left singular vectors."""
    true = torch.linalg.svd(W.double(), full_matrices=False).U[:, :rank]
    Q = torch.linalg.qr(computed.double()).Q
    return float(torch.linalg.matrix_norm(Q - true @ (true.mT @ Q), 2))


def defect(columns: Tensor) -> float:
    """Largest entry of |QᵀQ − I|."""
    Q = columns.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())
