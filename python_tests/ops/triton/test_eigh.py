"""The Jacobi kernel of loraxs::_eigh: in the interpreter against LAPACK, and compiled for three GPUs."""

from __future__ import annotations

import pytest
import torch

from ..symmetric import MATRICES, assert_solves, symmetric
from .harness import Interpreter, compile_launch, launches_of


@pytest.mark.parametrize("name", MATRICES)
def test_agrees_with_lapack(interpreted: Interpreter, name: str) -> None:
    A = MATRICES[name]()
    assert_solves(A, *interpreted("eigh.eigh", A))


def test_rows_of_several_tiles(interpreted: Interpreter) -> None:
    A = torch.diag_embed(torch.linspace(-1, 1, 67, dtype=torch.float64)[None])
    for i, j in ((0, 66), (1, 40), (20, 50)):
        A[:, i, j] = A[:, j, i] = 0.3
    assert_solves(A, *interpreted("eigh.eigh", A))


def test_a_diagonal_matrix_is_only_sorted(interpreted: Interpreter) -> None:
    A = torch.diag_embed(torch.tensor([[3.0, -1.0, 0.0, 3.0, 2.0]], dtype=torch.float64))
    values, vectors = interpreted("eigh.eigh", A)
    assert torch.equal(vectors, torch.eye(5, dtype=torch.float64)[:, [1, 2, 4, 0, 3]][None])
    assert float((values - torch.tensor([[-1.0, 0, 2, 3, 3]])).abs().max()) < 1e-15


def test_a_matrix_does_not_depend_on_the_others_and_repeats(interpreted: Interpreter) -> None:
    A = torch.cat([symmetric(2, 7), torch.zeros(1, 7, 7, dtype=torch.float64)])
    together, again = (interpreted("eigh.eigh", A) for _ in range(2))
    alone = interpreted("eigh.eigh", A[1:2])
    assert all(torch.equal(*pair) for pair in zip(together, again, strict=True))
    # cuBLAS and the CPU's products may sum one matrix in another order than several.
    for one, all_ in zip(alone, together, strict=True):
        assert float((one[0] - all_[1]).abs().max()) < 1e-14


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_the_results_of_its_matrix_only(interpreted: Interpreter, bad: float) -> None:
    A = symmetric(2, 6)
    A[0, 2, 4] = A[0, 4, 2] = bad
    values, vectors = interpreted("eigh.eigh", A)
    assert bool(values[0].isnan().all()) and bool(vectors[0].isnan().all())
    assert_solves(A[1:], values[1:], vectors[1:])


def test_what_has_not_converged_is_nan(interpreted: Interpreter) -> None:
    A = symmetric(1, 9)
    values, vectors = interpreted("eigh.eigh", A, max_sweeps=2)
    assert bool(values.isnan().all()) and bool(vectors.isnan().all())


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 0)], ids=str)
def test_empty_problems_launch_nothing(shape: tuple[int, int, int]) -> None:
    from loraxs_ext.ops.triton.eigh import eigh

    A = torch.zeros(shape, dtype=torch.float64)
    assert launches_of(eigh, A) == []
    values, vectors = eigh(A)
    assert values.shape == shape[:2] and vectors.shape == shape


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("n", [64, 127, 128])
def test_compiles_without_spills(n: int, arch: int) -> None:
    from loraxs_ext.ops.triton.eigh import eigh

    launches = launches_of(eigh, symmetric(3, n))
    assert len(launches) == 2 and launches[0].grid == (3,)
    compiled = compile_launch(launches[0], arch)
    compiled.assert_within_budget(arch)
    # Next to nothing in shared memory leaves the rest of the same 128 KiB and more to the L1 cache, where G lives.
    assert compiled.shared <= 4096
    # Each number of a tile is held by one thread: as many loads as the tiles have numbers, 16 bytes each if aligned.
    wide = compiled.ptx.count("ld.global.v2.b64")
    assert wide == (3 * 4 if n % 16 == 0 else 0)
