"""loraxs::orthonormalize and loraxs::randomized_svd as ops: schemas, fake kernels, refusals, agreement with fp64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import loraxs_ext.basis  # noqa: F401  (lends randomized_svd its owners)
from loraxs_ext.ops import backends, reference

orthonormalize = torch.ops.loraxs.orthonormalize.default
randomized_svd = torch.ops.loraxs.randomized_svd.default


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(batch: int, N: int, K: int) -> Tensor:
    left, right = (torch.linalg.qr(gaussian(batch, n, min(N, K), dtype=torch.float64, seed=n)).Q for n in (N, K))
    return ((left * torch.arange(1, min(N, K) + 1) ** -0.5) @ right.mT).float()


@pytest.mark.parametrize("shape", [(1, 9, 1), (3, 40, 7), (2, 16, 16), (0, 8, 3), (2, 8, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_orthonormalize_opcheck(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.library.opcheck(orthonormalize, (gaussian(*shape, dtype=dtype),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_randomized_svd_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(randomized_svd, (decaying(2, 30, 40).to(dtype), 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_orthonormalize_agrees_with_householder(dtype: torch.dtype) -> None:
    Y = gaussian(4, 200, 24, dtype=dtype)
    got = orthonormalize(Y)
    Q, R = torch.linalg.qr(Y.double())
    exact = Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((got - exact).abs().max()) < (1e-13 if dtype == torch.float64 else 1e-7)


@pytest.mark.skipif(not backends.COMPILED, reason="the compiled ops are not built")
@pytest.mark.parametrize("k", [1, 7, 16])
def test_the_compiled_pass_agrees_and_tells_what_it_cannot_do(k: int) -> None:
    Y = gaussian(3, k, 300)
    Q, pivots = torch.ops.loraxs._cholesky_qr(Y)
    exact = torch.linalg.qr(Y.double().mT)
    rows = (exact.Q * exact.R.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT
    assert float((Q - rows).abs().max()) < 1e-7 and bool((pivots > 0.5).all())
    Y[1, -1] = Y[1, 0] if k > 1 else 0.0
    Y[2, 0, 0] = torch.nan
    pivots = torch.ops.loraxs._cholesky_qr(Y)[1]
    assert pivots[0] > 0.5 and not bool((pivots[1:] > 1e-12).any())
    with pytest.raises((ValueError, RuntimeError), match="Y: expected dtype torch.float32"):
        torch.ops.loraxs._cholesky_qr(Y.double())


def test_orthonormalize_takes_any_strides() -> None:
    Y = gaussian(3, 50, 8)
    expected = orthonormalize(Y)
    wide = torch.full((3, 100, 16), torch.nan)
    wide[:, ::2, ::2] = Y
    for strided in (Y.mT.contiguous().mT, wide[:, ::2, ::2], Y[:1].expand(3, -1, -1)):
        want = expected if strided.stride(0) else expected[:1].expand(3, -1, -1)
        assert float((orthonormalize(strided) - want).abs().max()) < 1e-6


def test_fake_kernels_know_shapes_and_dtypes() -> None:
    with FakeTensorMode():
        Q = orthonormalize(torch.empty(2, 64, 8, dtype=torch.bfloat16, device="cuda"))
        assert (Q.shape, Q.dtype, Q.device.type) == ((2, 64, 8), torch.float32, "cuda")
        U, S, Vh = randomized_svd(torch.empty(3, 20, 30, dtype=torch.float16), 5)
        assert [tuple(part.shape) for part in (U, S, Vh)] == [(3, 20, 5), (3, 5), (3, 5, 30)]
        assert {part.dtype for part in (U, S, Vh)} == {torch.float32}


@pytest.mark.parametrize("shape", [(3, 60, 90), (2, 700, 600)], ids=["complete", "iterated"])
def test_randomized_svd_agrees_with_the_reference(shape: tuple[int, int, int]) -> None:
    W = decaying(*shape)
    exact, got = reference.randomized_svd(W, 6), randomized_svd(W, 6)
    for ours, truth in zip(got, exact, strict=True):
        assert ours.shape == truth.shape and ours.dtype == truth.dtype
    U, S, Vh = got
    sine = torch.linalg.matrix_norm(U - exact[0] @ (exact[0].mT @ U), 2)
    assert float(sine.max()) < 1e-3
    assert float((S - exact[1]).abs().max() / S.max()) < 5e-6
    delta, truth = (left * s[:, None] @ right for left, s, right in (got, exact))
    assert float((delta - truth).norm() / truth.norm()) < 1e-3


@pytest.mark.parametrize("rank", [0, 21])
def test_randomized_svd_refuses_impossible_ranks(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"20.*got {rank}"):
        randomized_svd(decaying(1, 20, 30), rank)
    with pytest.raises(ValueError, match=rf"rank: expected 1 to 20 .* got {rank}"):
        reference.randomized_svd(decaying(1, 20, 30), rank)


@pytest.mark.parametrize("op", [orthonormalize, lambda W: randomized_svd(W, 2)], ids=["orthonormalize", "svd"])
def test_shapes_and_values_are_refused_by_name(op) -> None:
    with pytest.raises(ValueError, match=r"\b[YW]: expected shape \["):
        op(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"\b[YW]: expected a dtype"):
        op(torch.zeros(1, 5, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="NaN"):
        op(torch.full((1, 5, 4), torch.nan))


def test_more_columns_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="Y: expected at most n=4 columns of length n, got 5"):
        orthonormalize(torch.zeros(1, 4, 5))


def test_autocast_does_not_lower_the_precision() -> None:
    Y, W = gaussian(1, 100, 8), decaying(1, 60, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Q, U = orthonormalize(Y), randomized_svd(W, 4)[0]
    assert torch.equal(Q, orthonormalize(Y)) and torch.equal(U, randomized_svd(W, 4)[0])


def test_owners_are_named() -> None:
    if backends.BACKEND == "reference":
        pytest.skip("the reference owns every op")
    owners = backends.owners()["randomized_svd"]
    assert owners == {"cpu": "block Lanczos", "cuda": "Chebyshev-filtered subspace iteration"}
    cpu = backends.owners()["orthonormalize"]["cpu"]
    assert cpu == ("C++ for k ≤ 16, plain torch beyond" if backends.COMPILED else "plain torch")


def test_unconverged_decompositions_warn_through_the_op() -> None:
    if backends.BACKEND == "reference":
        pytest.skip("the reference does not iterate")
    with pytest.warns(RuntimeWarning, match="subspace tolerance"):
        randomized_svd(torch.eye(600)[None], 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        randomized_svd(decaying(1, 600, 600), 4)
