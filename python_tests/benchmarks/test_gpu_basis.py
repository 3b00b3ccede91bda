"""The bases' GPU benchmark without a GPU: its rows, and the C interface of cuSOLVER against a stand-in on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from benchmarks.gpu import basis
from benchmarks.gpu.cusolver import NotAvailable, Xgesvdr

CPU = torch.device("cpu")


class StandIn:
    """What cusolverDn.h says, with columns stored one after the other, on memory of the CPU."""

    def __init__(self, *, status: int = 0, info: int = 0, noise: float = 0.0) -> None:
        def create(pointer: Any) -> int:
            pointer._obj.value = 1
            return 0

        def stream(*_: Any) -> int:
            raise AssertionError("there are no streams on a CPU")

        def size(*arguments: Any) -> int:
            arguments[-2]._obj.value, arguments[-1]._obj.value = 40, 24
            return 0

        def svd(handle, params, jobu, jobv, m, n, k, p, niters, *rest: Any) -> int:
            (a_type, a, lda, s_type, s, u_type, u, ldu, v_type, v, ldv, compute) = rest[:12]
            on_device, device_bytes, on_host, host_bytes, d_info = rest[12:]
            assert (handle.value, params.value, jobu, jobv) == (1, 1, ord("S"), ord("S"))
            assert {a_type, s_type, u_type, v_type, compute} == {0} and (device_bytes, host_bytes) == (40, 24)
            assert m >= n and 0 < k + p <= n and niters > 0 and (lda, ldu, ldv) == (m, m, n)
            A = columns(a, n, m).mT + noise * torch.randn(m, n)
            U, S, Vh = torch.linalg.svd(A, full_matrices=False)
            columns(u, k, m).copy_(U[:, :k].mT)
            columns(v, k, n).copy_(Vh[:k])
            columns(s, 1, k).copy_(S[None, :k])
            columns(a, n, m).fill_(torch.nan)
            ctypes.c_int.from_address(d_info).value = info
            return status

        self.cusolverDnCreate = self.cusolverDnCreateParams = create
        self.cusolverDnSetStream = stream
        self.cusolverDnXgesvdr_bufferSize, self.cusolverDnXgesvdr = size, svd


def columns(address: int, count: int, length: int) -> torch.Tensor:
    """[count, length] fp32 at an address: what torch calls rows."""
    return torch.frombuffer((ctypes.c_float * (count * length)).from_address(address), dtype=torch.float32).reshape(
        count, length
    )


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (50, 50)], ids=str)
def test_xgesvdr_gives_left_singular_vectors_and_leaves_the_weight(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = W.clone()
    found = Xgesvdr(CPU, StandIn())(W, 6, 32, 2)
    U = torch.linalg.svd(W, full_matrices=False)[0][:, :6]
    assert found.shape == U.shape and torch.equal(W, before)
    assert float((found @ (found.mT @ U) - U).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (StandIn(status=3), "Xgesvdr returned status 3"),
        (StandIn(info=1), "info is 1"),
        (StandIn(noise=1.0), "misses .* of a 96 × 64 matrix of rank 8"),
        (object(), "has no cusolverDnCreate"),
    ],
    ids=["status", "info", "wrong", "missing"],
)
def test_xgesvdr_says_why_it_is_not_available(library: Any, reason: str) -> None:
    with pytest.raises(NotAvailable, match=reason):
        Xgesvdr(CPU, library)


def test_rows_of_a_dry_run() -> None:
    rows = basis.measure(CPU, dry=True)
    (model,) = (row for row in rows if row["kind"] == "basis")
    assert set(model["worst_error"]) == {"ours", "torch.svd_lowrank", "torch.linalg.svd"}
    assert set(model["not_available"].values()) == {"not available: needs a CUDA device"}
    eigenproblems = [row for row in rows if row["kind"] == "eigh"]
    assert {row["spectrum"] for row in eigenproblems} == {"start", "filtered"}
    for row in rows:
        assert "seconds" not in row and "speedup" not in row
    for row in eigenproblems:
        assert row["wrong"] == []
        assert set(row["worst_error"]) | set(row["not_available"]) == {"torch.linalg.eigh", "Jacobi"}
