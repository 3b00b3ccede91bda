from __future__ import annotations

import pytest
import torch

from loraxs_ext.basis import orthonormalize

from .matrices import defect, gaussian, with_spectrum

BLOCKS = {
    "well conditioned": gaussian(200, 16),
    "condition 1e6": with_spectrum(200, 16, torch.logspace(0, -6, 16)),
    "condition 1e14": with_spectrum(200, 16, torch.logspace(0, -14, 16)),
    "scaled columns": gaussian(200, 16) * torch.logspace(-30, 30, 16),
    "zero": torch.zeros(50, 7),
    "a zero column": gaussian(50, 7) * torch.tensor([1.0, 1, 0, 1, 1, 0, 1]),
    "equal columns": gaussian(50, 1).expand(50, 7),
    "square": gaussian(12, 12),
    "one column": gaussian(9, 1),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-7), (torch.float64, 3e-14)], ids=["fp32", "fp64"])
def test_columns_are_orthonormal(name: str, dtype: torch.dtype, limit: float) -> None:
    Q = orthonormalize(BLOCKS[name].to(dtype))
    assert Q.dtype == dtype and Q.shape == BLOCKS[name].shape
    assert defect(Q) < limit


def test_leading_columns_span_the_same() -> None:
    Y = gaussian(80, 6).double()
    Q = orthonormalize(Y)
    for i in range(1, 7):
        lost = Y[:, :i] - Q[:, :i] @ (Q[:, :i].mT @ Y[:, :i])
        assert float(lost.abs().max()) < 1e-12


def test_dependent_column_is_completed_without_touching_the_others() -> None:
    Y = gaussian(80, 4).double()
    Y[:, 2] = Y[:, 0] - 2 * Y[:, 1]
    Q = orthonormalize(Y)
    kept = Y[:, [0, 1, 3]]
    assert defect(Q) < 1e-13
    assert float((kept - Q @ (Q.mT @ kept)).abs().max()) < 1e-6


def test_batch_with_one_hard_matrix_leaves_the_others_alone() -> None:
    easy = gaussian(3, 40, 5)
    batch = torch.cat([easy, torch.zeros(1, 40, 5)])
    assert torch.equal(orthonormalize(batch)[:3], orthonormalize(easy))
    assert defect(orthonormalize(batch)[3]) < 3e-7


def test_half_types_come_back_in_fp32() -> None:
    Q = orthonormalize(gaussian(30, 4).bfloat16())
    assert Q.dtype == torch.float32 and defect(Q) < 3e-7


def test_empty() -> None:
    assert orthonormalize(torch.zeros(0, 8, 3)).shape == (0, 8, 3)
    assert orthonormalize(torch.zeros(8, 0)).shape == (8, 0)


def test_more_columns_than_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="Y: expected at most n=3 columns of length n, got 4"):
        orthonormalize(torch.zeros(3, 4))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        orthonormalize(torch.full((5, 2), torch.nan))
