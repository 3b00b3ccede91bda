"""Decompositions on the device: the same subspaces as on the CPU, the same bits every time, streamed or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraxs_ext.basis import Recipe, decompose, randomized_svd
from loraxs_ext.basis.streaming import Stager, chunk_bytes
from loraxs_ext.ops import reference

from ..basis.matrices import CASES, defect, gaussian, power_law, spiked, subspace_sine
from ..basis.test_svd import check_properties, unconverged_allowed
from ..ops.symmetric import MATRICES, assert_solves, gram, near_diagonal, symmetric

pytestmark = pytest.mark.gpu

orthonormalize = torch.ops.loraxs.orthonormalize.default


def sine(one: Tensor, two: Tensor) -> float:
    """Sine of the largest angle between the spans of orthonormal columns."""
    one, two = one.double().cpu(), two.double().cpu()
    return float(torch.linalg.matrix_norm(one - two @ (two.mT @ one), 2))


@pytest.mark.parametrize("shape", [(3, 900, 64), (1, 4096, 128), (2, 300, 256), (2, 400, 300), (5, 70, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_orthonormalize_agrees_with_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    Y = gaussian(*shape).to(dtype)
    got, exact = orthonormalize(Y.cuda()), reference.orthonormalize(Y.double())
    assert float((got.cpu() - exact).abs().max()) < 1e-6
    assert all(defect(Q.cpu()) < 3e-7 for Q in got)
    assert torch.equal(got, orthonormalize(Y.cuda()))


def test_orthonormalize_completes_dependent_columns() -> None:
    Y = gaussian(2, 500, 80)
    Y[0, :, 3], Y[0, :, 70], Y[1] = 0.0, Y[0, :, 1] - 2 * Y[0, :, 40], 0.0
    assert all(defect(Q) < 3e-7 for Q in orthonormalize(Y.cuda()).cpu())


@pytest.mark.parametrize("name", [*MATRICES, "32", "64", "97", "127", "128", "filtered 96", "Gram 128"])
def test_jacobi_solves_symmetric_eigenproblems(name: str) -> None:
    eigh = pytest.importorskip("loraxs_ext.ops.triton.eigh", reason="Triton is not installed").eigh
    larger = {"filtered 96": lambda: near_diagonal(20, 96), "Gram 128": lambda: gram(150, 128, 100)}
    larger |= {str(n): lambda n=n: symmetric(3, n) for n in (32, 64, 97, 127, 128)}
    A = (MATRICES | larger)[name]()
    found, again = eigh(A.cuda()), eigh(A.cuda())
    assert_solves(A, *(part.cpu() for part in found))
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_eigh_on_the_device_whoever_solves_it() -> None:
    for A in (symmetric(64, 64), symmetric(2, 64), symmetric(16, 160), symmetric(0, 8)):
        values, vectors = torch.ops.loraxs._eigh(A.cuda())
        assert values.is_cuda and vectors.is_cuda
        if A.numel():
            assert_solves(A, values.cpu(), vectors.cpu())


@pytest.mark.parametrize("method", ["auto", "block_lanczos", "chebyshev"])
@pytest.mark.parametrize("name", CASES)
def test_properties(name: str, method: str) -> None:
    W = CASES[name]().float()
    with unconverged_allowed():
        found = randomized_svd(W.cuda(), 16, method=method)
    check_properties(W, type(found)(*(part.cpu() for part in found)), False)


@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
def test_a_global_tf32_switch_does_not_reach_the_result(allowed: str) -> None:
    W = torch.stack([spiked(1024, 1024, seed=i).float() for i in range(4)])
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = allowed
        found, measured = randomized_svd(W.cuda(), 16, diagnostics=True)
        assert backend.fp32_precision == allowed
    finally:
        backend.fp32_precision = before
    for i in range(4):
        true = subspace_sine(found.U[i].cpu(), W[i], 16)
        assert true <= float(measured.subspace_error[i]) <= 1e-3


def test_the_same_bits_every_time_and_the_subspace_of_the_cpu() -> None:
    W = power_law(1024, 2048, 0.4).float()
    one, two = (randomized_svd(W.cuda(), 25) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert sine(one.U, randomized_svd(W, 25).U) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stacks_pass_through_pinned_memory(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    stager = Stager(device, overlap=True)
    chunks = [[gaussian(300, 200, seed=10 * c + i).to(dtype) for i in range(5)] for c in range(4)]
    chunks[1][2] = chunks[1][2].to(device)
    for chunk in chunks:
        stack = stager.stack(chunk, torch.float32).wait()
        assert torch.equal(stack.cpu(), torch.stack([weight.cpu() for weight in chunk]).float())
    assert 0 < chunk_bytes(device) <= torch.cuda.mem_get_info(device)[1]


@pytest.mark.parametrize("svd", ["converged", "reference"])
def test_weights_of_the_cpu_are_streamed_through_the_gpu(svd: str) -> None:
    weights = {f"{i}": spiked(640, 700, seed=i).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(6)}
    sources = {name: (lambda W=W: W.clone()) if int(name) > 2 else W for name, W in weights.items()}
    found = decompose(sources, 8, Recipe(svd=svd), compute_device="cuda", progress=False)
    assert list(found) == list(weights)
    for name, W in weights.items():
        a, bt = found[name].a, found[name].bt
        assert a.device.type == bt.device.type == "cpu"
        assert float((bt @ W.float() - a).norm() / a.norm()) < 1e-6
        plain = decompose({"w": W}, 8, Recipe(svd=svd), progress=False)["w"]
        assert float((bt.mT @ a - plain.bt.mT @ plain.a).norm() / plain.a.norm()) < 3e-3
