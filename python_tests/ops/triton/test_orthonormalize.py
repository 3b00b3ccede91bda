"""The Triton owner of loraxs::orthonormalize: in the interpreter against the reference, and compiled for three GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference

from ..problems import assert_within_twice
from .harness import Interpreter, compile_launch, launches_of


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def defect(Q: Tensor) -> float:
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def spread(n: int, k: int, exponent: float) -> Tensor:
    """[1, n, k] columns of condition 10^exponent."""
    left, right = (torch.linalg.qr(gaussian(m, k).double()).Q for m in (n, k))
    return ((left * torch.logspace(0, -exponent, k).double()) @ right.mT)[None].float()


# One block, several of them with a rest, several programs for the Gram matrix, square, one column.
PROBLEMS = [
    *(((2, 40, 7), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((shape, torch.float32) for shape in ((1, 64, 50), (1, 1050, 3), (1, 34, 34), (1, 9, 1))),
]


@pytest.mark.parametrize(("shape", "dtype"), PROBLEMS, ids=str)
def test_error_within_twice_plain_torch(interpreted: Interpreter, shape, dtype):
    Y = gaussian(*shape).to(dtype)
    got, plain = interpreted("orthonormalize.orthonormalize", Y), reference.orthonormalize(Y)
    assert got.dtype == plain.dtype == torch.float32 and got.mT.is_contiguous()
    assert_within_twice(got, plain, reference.orthonormalize(Y.double()), "Q")
    assert defect(got) < 2e-7


DEPENDENT = {
    "a zero column": gaussian(1, 60, 9) * torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1, 1]),
    "a combination in another block": torch.cat([gaussian(1, 60, 34), gaussian(1, 60, 34)[..., :1] * 3], -1),
    "equal columns": gaussian(1, 50, 1).expand(1, 50, 7),
    "nothing but zeros": torch.zeros(1, 40, 9),
    "square of rank 3": gaussian(1, 20, 3) @ gaussian(1, 3, 20, seed=1),
    "condition 1e6": spread(60, 34, 6.0),
    "condition 1e14": spread(60, 20, 14.0),
    "scaled columns": gaussian(1, 50, 8) * torch.logspace(-30, 30, 8),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_ill_conditioned_and_dependent_columns(interpreted: Interpreter, name):
    Q = interpreted("orthonormalize.orthonormalize", DEPENDENT[name])
    assert bool(torch.isfinite(Q).all()) and defect(Q) < 3e-7


def test_lost_columns_leave_the_others_alone(interpreted: Interpreter):
    Y = gaussian(1, 60, 36)
    Y[..., 3], Y[..., 33] = 0.0, Y[..., 1] - 2 * Y[..., 20]
    Q = interpreted("orthonormalize.orthonormalize", Y)[0].double()
    kept = Y[0].double()
    for i in (3, 10, 33, 36):
        lost = kept[:, :i] - Q[:, :i] @ (Q[:, :i].mT @ kept[:, :i])
        assert float(lost.abs().max()) < 1e-5


def test_strides_do_not_matter(interpreted: Interpreter):
    Y = gaussian(2, 40, 9)
    wide = torch.full((2, 80, 18), float("nan"))
    wide[:, ::2, ::2] = Y
    expected = interpreted("orthonormalize.orthonormalize", Y)
    for strided in (Y.mT.contiguous().mT, wide[:, ::2, ::2]):
        assert torch.equal(interpreted("orthonormalize.orthonormalize", strided), expected)


def test_a_matrix_does_not_depend_on_the_others_and_repeats(interpreted: Interpreter):
    Y = torch.cat([gaussian(2, 40, 9), torch.zeros(1, 40, 9)])
    together, again = (interpreted("orthonormalize.orthonormalize", Y) for _ in range(2))
    assert torch.equal(together, again)
    assert torch.equal(interpreted("orthonormalize.orthonormalize", Y[1:2])[0], together[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_mistaken_for_a_lost_column(interpreted: Interpreter, bad):
    Y = gaussian(2, 40, 5)
    Y[0, 7, 2] = bad
    Q = interpreted("orthonormalize.orthonormalize", Y)
    assert bool(Q[0, :, 2:].isnan().all()) and bool(torch.isfinite(Q[1]).all())


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0)], ids=str)
def test_empty_problems_launch_nothing(shape):
    from loraxs_ext.ops.triton.orthonormalize import orthonormalize

    Y = torch.zeros(*shape)
    assert launches_of(orthonormalize, Y) == []
    assert orthonormalize(Y).shape == shape


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_with_few_spills_to_double_tensor_cores(monkeypatch: pytest.MonkeyPatch, arch: int):
    from loraxs_ext.ops.triton import orthonormalize as module

    monkeypatch.setattr(module, "_major_capability", lambda device: arch // 10)
    launches = launches_of(module.orthonormalize, torch.empty(24, 64, 1024).mT)
    assert len(launches) == 3 * module.PASSES
    on_tensor_cores = arch < 100 or module.TENSOR_CORES_FROM_BLACKWELL_ON
    for launch, registers in zip(launches[:3], (96, 255, 96 if on_tensor_cores else 192), strict=True):
        compiled = compile_launch(launch, arch)
        # Up to 24 bytes a thread, by Triton's version (3.7, sm_100).
        assert compiled.stack <= 24 and compiled.registers <= registers and compiled.shared <= 48 * 1024
        if on_tensor_cores:
            assert compiled.tensor_core() == {"mma.sync"} and ".f64.f64" in compiled.ptx


def test_grids():
    from loraxs_ext.ops.triton.orthonormalize import orthonormalize

    gram, factor, apply, *_ = launches_of(orthonormalize, torch.empty(24, 4096, 128))
    assert (gram.grid, factor.grid, apply.grid) == ((16, 4, 24), (24,), (128, 4, 24))
