from __future__ import annotations

import pytest
import torch

from loraxs_ext.basis import Factors, Recipe, compare_sketch, decompose, sketch

from .matrices import gaussian, power_law


def basis(W: torch.Tensor, rank: int = 10, **fields: object) -> Factors:
    return decompose({"w": W}, rank, Recipe(**fields), progress=False)["w"]


W = power_law(120, 90, 0.5).float()


def test_a_sketch_is_twenty_bytes_a_vector() -> None:
    found = sketch(basis(W))
    assert found.shape == (5, 10) and found.dtype == torch.float32
    assert float(found[:4].abs().max()) < 6 and float(found[:4].std()) > 0.5
    assert torch.equal(sketch(basis(W), 4), found[:, :4])


@pytest.mark.parametrize("sigma", ["A", "sqrt", "B"])
def test_same_basis(sigma: str) -> None:
    signs, error = compare_sketch(sketch(basis(W), 6), basis(W, sigma=sigma))
    assert torch.equal(signs, torch.ones(6)) and float(error.max()) < 1e-4


def test_flipped_signs_are_found() -> None:
    mine = basis(W)
    flips = torch.tensor([1.0, -1, 1, -1, -1, 1, 1, 1, 1, -1])
    theirs = Factors(mine.a * flips[:, None], mine.bt * flips[:, None], mine.s, 0.0)
    signs, error = compare_sketch(sketch(theirs), mine)
    assert torch.equal(signs, flips) and float(error.max()) < 1e-6


def test_the_same_base_in_another_precision_is_near() -> None:
    _, error = compare_sketch(sketch(basis(W)), basis(W.bfloat16()))
    assert 1e-5 < float(error.max()) < 0.2


def test_a_wrong_base_is_found() -> None:
    for other in (power_law(120, 90, 0.5, seed=20).float(), gaussian(120, 90)):
        _, error = compare_sketch(sketch(basis(W)), basis(other))
        assert float(error.median()) > 0.3


def test_exchanged_vectors_and_other_singular_values_are_found() -> None:
    mine = basis(W)
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7, 8, 9])
    _, error = compare_sketch(sketch(mine), Factors(mine.a[order], mine.bt[order], mine.s[order], 0.0))
    assert float(error[:2].min()) > 0.2 and float(error[2:].max()) == 0.0
    _, error = compare_sketch(sketch(mine), Factors(mine.a, mine.bt, mine.s * 1.01, 0.0))
    assert error.tolist() == pytest.approx([0.01 / 1.01] * 10, rel=1e-3)


def test_null_vectors_compare_as_equal() -> None:
    zero = basis(torch.zeros(20, 30), 3)
    signs, error = compare_sketch(sketch(zero), zero)
    assert torch.equal(signs, torch.ones(3)) and float(error.max()) == 0.0
    assert torch.isfinite(sketch(zero)).all()


@pytest.mark.parametrize("row", range(5))
def test_numbers_that_are_none_never_compare_as_equal(row: int) -> None:
    stored = sketch(basis(W))
    stored[row, 2] = torch.nan
    _, error = compare_sketch(stored, basis(W))
    assert error[2] == torch.inf and error.isfinite().sum() == 9


def test_what_is_no_sketch_is_refused() -> None:
    mine = basis(W, 4)
    with pytest.raises(ValueError, match=r"\[5, r\], got \(4, 10\)"):
        compare_sketch(torch.zeros(4, 10), mine)
    with pytest.raises(ValueError, match="between 1 and the 4"):
        compare_sketch(torch.zeros(5, 6), mine)
