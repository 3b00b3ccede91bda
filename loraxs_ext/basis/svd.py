"""Batched truncated SVD: the public function behind every basis."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from loraxs_ext.ops.backends import compose

from .precision import check_floating, full_precision, scale_exponents, times_power_of_two
from .recipe import Recipe, Vectors
from .solver import Method, check_rank, solve, warn_unconverged


class SVD(NamedTuple):
    """U[..., N, r] and Vh[..., r, K] with orthonormal columns and rows, S[..., r]; U Uᵀ W = U·diag(S)·Vh."""

    U: Tensor
    S: Tensor
    Vh: Tensor


class Diagnostics(NamedTuple):
    """How well a decomposition converged.

    Attributes:
        subspace_error: [...] fp64, estimated sine of the largest angle between span(U) and the true subspace.
        cut_errors: [..., r] fp64, the same for every smaller rank.
        gap: [...] fp64, distance of the chosen σ² to the others, relative to the closest chosen one; +inf if none.
        steps: [...] int64, Lanczos steps of two products with W each; 0 for a complete decomposition.
    """

    subspace_error: Tensor
    cut_errors: Tensor
    gap: Tensor
    steps: Tensor


@overload
def randomized_svd(
    W: Tensor,
    rank: int,
    *,
    n_oversamples: int = ...,
    tol: float = ...,
    max_iter: int = ...,
    seed: int = ...,
    vectors: Vectors = ...,
    method: Method = ...,
    diagnostics: Literal[False] = ...,
) -> SVD: ...


@overload
def randomized_svd(
    W: Tensor,
    rank: int,
    *,
    n_oversamples: int = ...,
    tol: float = ...,
    max_iter: int = ...,
    seed: int = ...,
    vectors: Vectors = ...,
    method: Method = ...,
    diagnostics: Literal[True],
) -> tuple[SVD, Diagnostics]: ...


def randomized_svd(
    W: Tensor,
    rank: int,
    *,
    n_oversamples: int = 32,
    tol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
    vectors: Vectors = "top",
    method: Method = "auto",
    diagnostics: bool = False,
) -> SVD | tuple[SVD, Diagnostics]:
    """Singular triplets of each matrix in a batch, converged until the measured subspace error meets `tol`.

    The same seed gives the same bits; another seed, device or method gives the same subspace up to `tol` and the
    rounding of the dtype. Signs are canonical: ⟨u_i, h⟩ ≥ 0 for a fixed pseudo-random h. Vectors that belong to a
    singular value of zero are completed to orthonormal ones. Block Krylov range finder (Musco and Musco, "Randomized
    Block Krylov Methods", NeurIPS 2015) with the Rayleigh–Ritz step in fp64; small sides and large ranks are decomposed
    completely.

    Args:
        W: [..., N, K], fp32, fp64, bf16 or fp16; any strides. Half types are decomposed and returned in fp32.
        rank: number of triplets r, between 1 and min(N, K).
        n_oversamples: Ritz vectors beyond the rank that survive a restart of the iteration, at least 1.
        tol: bound on the sine of the largest angle between the computed and the true subspace.
        max_iter: bound on the number of Lanczos steps.
        seed: 64-bit seed of the starting block and of vectors="random".
        vectors: "top" from the largest down; "bottom" from the smallest up; "middle" outward from the centre of the
            spectrum; "random" a permutation fixed by the seed. The first r of a larger rank are those of a smaller one.
            All but "top" need a complete decomposition, at O(N K min(N, K)) cost.
        method: "block_lanczos", "chebyshev", "exact", or "auto", which picks one for the shape and device.
        diagnostics: also return what was measured.

    Returns:
        SVD, or (SVD, Diagnostics).

    Raises:
        TypeError: W is not a floating-point tensor.
        ValueError: W contains NaN or Inf, or another argument is out of range.

    Warns:
        RuntimeWarning: the tolerance was not met, with the error, the gap and the number of steps.
    """
    recipe = Recipe(vectors=vectors, n_oversamples=n_oversamples, tol=tol, max_iter=max_iter, seed=seed)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    check_floating(W, "W")
    check_rank(rank, W.shape, "W")
    lead, (N, K) = W.shape[:-2], W.shape[-2:]
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    with full_precision(W.device):
        stack = W.reshape(-1, N, K)
        if len(stack) == 0:
            empty = [W.new_zeros(*lead, *shape, dtype=dtype) for shape in ((N, rank), (rank,), (rank, K))]
            zero = W.new_zeros(lead, dtype=torch.float64)
            measured = Diagnostics(zero, zero[..., None].expand(*lead, rank), zero, zero.long())
            return (SVD(*empty), measured) if diagnostics else SVD(*empty)
        names = ["W"] if not lead else [f"W[{i}]" for i in range(len(stack))]
        exponents = scale_exponents(stack, names)
        stack = times_power_of_two(stack.to(dtype).contiguous(), [-e for e in exponents])
        found = solve(stack, rank, recipe, method)
    warn_unconverged(dict(zip(names, found.convergence(), strict=True)), tol)
    result = SVD(
        found.left.mT.reshape(*lead, N, rank),
        times_power_of_two(found.s, exponents).reshape(*lead, rank),
        found.right.reshape(*lead, rank, K),
    )
    if not diagnostics:
        return result
    errors = found.errors.reshape(*lead, rank)
    measured = Diagnostics(errors[..., -1], errors, found.gaps[:, -1].reshape(lead), found.steps.reshape(lead))
    return result, measured


def _owner(
    W: Tensor, rank: int, n_oversamples: int = 32, tol: float = 1e-3, max_iter: int = 100, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    found = randomized_svd(W, rank, n_oversamples=n_oversamples, tol=tol, max_iter=max_iter, seed=seed)
    return found.U.mT.contiguous().mT, found.S.contiguous(), found.Vh.contiguous()


compose("randomized_svd", "cpu", "block Lanczos", _owner)
compose("randomized_svd", "cuda", "Chebyshev-filtered subspace iteration", _owner)
