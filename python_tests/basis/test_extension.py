from __future__ import annotations

import pytest
import torch

from loraxs_ext.basis import Factors, Recipe, decompose, extend

from .matrices import defect, gaussian, power_law, spiked


def basis(W: torch.Tensor, rank: int, recipe: Recipe) -> Factors:
    return decompose({"w": W}, rank, recipe, progress=False)["w"]


@pytest.mark.parametrize("vectors", ["top", "middle", "bottom", "random"])
@pytest.mark.parametrize("sigma", ["A", "sqrt", "B"])
@pytest.mark.parametrize("shape", [(70, 50), (50, 70)], ids=["tall", "wide"])
def test_old_rows_stay_and_new_ones_are_those_of_the_larger_rank(
    shape: tuple[int, int], sigma: str, vectors: str
) -> None:
    W, recipe = power_law(*shape, 0.5).float(), Recipe(sigma=sigma, vectors=vectors)
    old, whole = basis(W, 4, recipe), basis(W, 9, recipe)
    grown = extend(old, W, 9, recipe)
    for part, kept, expected in zip(grown[:3], old[:3], whole[:3], strict=True):
        assert torch.equal(part[:4], kept)
        assert part.shape == expected.shape
        assert float((part - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_iterated_basis_grows() -> None:
    W, recipe = spiked(560, 600).float(), Recipe()
    grown = extend(basis(W, 4, recipe), W, 12, recipe)
    assert defect(grown.bt.mT) < 1e-6
    assert float((grown.a - grown.bt @ W).abs().max()) < 1e-5
    assert grown.subspace_error <= recipe.tol


def test_an_unconverged_basis_keeps_its_rows_and_gets_orthogonal_ones() -> None:
    W = gaussian(40, 60)
    bt = torch.linalg.qr(gaussian(40, 3)).Q.mT.contiguous()
    old = Factors(bt @ W, bt, torch.linalg.vector_norm(bt @ W, dim=1), 1.0)
    grown = extend(old, W, 8, Recipe())
    assert torch.equal(grown.bt[:3], bt) and defect(grown.bt.mT) < 1e-6
    assert float((grown.a - grown.bt @ W).abs().max()) < 1e-5
    assert grown.subspace_error == 1.0


def test_growth_that_does_not_converge_is_warned_of() -> None:
    W, recipe = gaussian(560, 600), Recipe(tol=1e-6, max_iter=1)
    with pytest.warns(RuntimeWarning, match="subspace tolerance"):
        old = basis(W, 4, recipe)
    with pytest.warns(RuntimeWarning, match="1 of 1 weights miss the subspace tolerance.*layer.q"):
        grown = extend(old, W, 8, recipe, name="layer.q")
    assert grown.subspace_error > recipe.tol


def test_dtype_of_the_old_basis_is_kept() -> None:
    W = power_law(40, 60, 0.5).float()
    old = decompose({"w": W}, 3, dtype=torch.bfloat16, progress=False)["w"]
    grown = extend(old, W, 5, Recipe())
    assert grown.a.dtype == grown.bt.dtype == torch.bfloat16 and torch.equal(grown.a[:3], old.a)


def test_a_smaller_rank_is_a_cut() -> None:
    W, recipe = gaussian(40, 60), Recipe()
    old = basis(W, 5, recipe)
    assert all(torch.equal(cut, part[:3]) for cut, part in zip(extend(old, W, 3, recipe)[:3], old[:3], strict=True))


def test_mistakes_are_named() -> None:
    W, recipe = gaussian(40, 60), Recipe()
    old = basis(W, 5, recipe)
    with pytest.raises(ValueError, match=r"'layer.q'.*got 41"):
        extend(old, W, 41, recipe, name="layer.q")
    with pytest.raises(ValueError, match=r"shape \(40, 60\), but weight 'W' has shape \(60, 40\)"):
        extend(old, W.mT, 6, recipe)
    with pytest.raises(ValueError, match="NaN"):
        extend(old, torch.full((40, 60), torch.nan), 6, recipe)
