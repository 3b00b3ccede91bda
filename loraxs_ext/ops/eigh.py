"""loraxs::_eigh: eigenvalues and eigenvectors of a batch of small symmetric matrices, without leaving the device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import contract as contract

# Not measured: a model. Before 2.12, torch hands matrices of l > 32 to cuSOLVER one by one, 0.2 ms and more each at
# l = 64. The Jacobi kernel takes all of them at once: for l = 64 to 128, about 10 sweeps of l − 1 steps of 1 to 2 µs,
# 1 to 3 ms however many there are up to one a multiprocessor. From 2.12 on torch has one batched call, not slower.
# TODO: replace by the crossing that the rows "eigh" of benchmarks/gpu/basis.py show, once a GPU has run them.
TORCH_LOOPS_OVER_THE_BATCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12)
JACOBI_FROM_BATCH = 16
BATCHED_BY_TORCH = 32
# A matrix of 128 KiB stays in the L1 cache of a multiprocessor: 192 KiB of an A100, 256 of an H100.
MAX_JACOBI = 128


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and orthonormal eigenvectors, as `torch.linalg.eigh` gives them.

    Args:
        A: [batch, l, l], fp64, symmetric.

    Returns:
        values [batch, l] and vectors [batch, l, l], as columns, both fp64: ‖A v − λ v‖ of a few ulp of ‖A‖.

    Raises:
        ValueError: A is of another dtype or shape.
        RuntimeError: torch's solver did not converge, or met NaN or Inf. Jacobi's does not wait for the device to find
            out and returns NaN.
    """
    contract.check_symmetric(A)
    return torch.linalg.eigh(A)


def by_jacobi(A: Tensor, *, asked_for: bool = False) -> bool:
    """Whether the Jacobi kernel solves A on a GPU that can run it, or torch.

    Args:
        A: [batch, l, l].
        asked_for: whenever it can, not only where it should be faster.
    """
    batch, size, _ = A.shape
    faster = TORCH_LOOPS_OVER_THE_BATCH and batch >= JACOBI_FROM_BATCH and size > BATCHED_BY_TORCH
    return size <= MAX_JACOBI and (asked_for or faster)
