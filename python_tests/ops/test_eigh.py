"""loraxs::_eigh: what the op gives on the CPU and in fake tensors, what it refuses, and who solves on GPUs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loraxs_ext.ops import eigh

from .symmetric import MATRICES, assert_solves, symmetric

solve = torch.ops.loraxs._eigh.default


@pytest.mark.parametrize("name", MATRICES)
def test_the_op_on_the_cpu(name: str) -> None:
    A = MATRICES[name]()
    assert_solves(A, *solve(A))


def test_opcheck_and_fake_tensors() -> None:
    torch.library.opcheck(solve, (symmetric(2, 5),))
    with FakeTensorMode():
        values, vectors = solve(torch.empty(3, 7, 7, dtype=torch.float64, device="cuda"))
        assert (values.shape, vectors.shape) == ((3, 7), (3, 7, 7))
        assert values.device.type == vectors.device.type == "cuda"


def test_other_dtypes_and_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"A: expected dtype torch.float64, got torch.float32"):
        solve(torch.eye(3)[None])
    with pytest.raises(ValueError, match=r"A: expected shape \[batch, l, l\], got \[2, 3, 4\]"):
        solve(torch.zeros(2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("loops", [True, False])
def test_jacobi_takes_batches_that_torch_would_loop_over(monkeypatch: pytest.MonkeyPatch, loops: bool) -> None:
    monkeypatch.setattr(eigh, "TORCH_LOOPS_OVER_THE_BATCH", loops)
    assert eigh.by_jacobi(torch.empty(96, 64, 64)) == loops
    assert eigh.by_jacobi(torch.empty(24, 128, 128)) == loops
    for shape in ((1, 64, 64), (96, 32, 32), (96, 129, 129)):
        assert not eigh.by_jacobi(torch.empty(shape))
    assert eigh.by_jacobi(torch.empty(1, 20, 20), asked_for=True)
    assert not eigh.by_jacobi(torch.empty(96, 129, 129), asked_for=True)
