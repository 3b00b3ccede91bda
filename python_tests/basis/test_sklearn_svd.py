"""svd="reference" is the basis of the LoRA-XS code: scikit-learn's call on the transposed weight, in every respect."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from loraxs_ext.basis import Recipe, decompose, extend

from .matrices import defect, gaussian, power_law, spiked, subspace_sine

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is what the basis is compared with")
SKLEARN_RULE = "columns of B" if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 5) else "rows of A"

# Name: weight, rank, and the relative difference of ΔW that is allowed.
WEIGHTS = {
    "flat square": (lambda: gaussian(256, 256), 25, 1e-3),
    "flat tall": (lambda: gaussian(400, 192, seed=1), 16, 1e-3),
    "flat wide": (lambda: gaussian(192, 400, seed=2), 64, 1e-3),
    "slow decay": (lambda: power_law(384, 384, 0.25), 16, 1e-3),
    "decaying tall": (lambda: power_law(500, 300, 0.5), 25, 1e-4),
    "decaying wide": (lambda: power_law(300, 500, 1.0), 25, 1e-4),
    "spiked": (lambda: spiked(384, 384), 20, 1e-4),
    "rank beyond the smaller side less ten": (lambda: power_law(40, 60, 0.5), 36, 1e-4),
}


def reference(W: Tensor, rank: int, n_iter: int = 10, random_state: int = 42) -> tuple[Tensor, Tensor]:
    """A and B as the reference code computes them."""
    X = W.numpy().T
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(n_components=rank, n_iter=n_iter, random_state=random_state)
    svd.fit(X)
    return torch.from_numpy(X @ svd.components_.T).T, torch.from_numpy(svd.components_).T


def delta(a: Tensor, b: Tensor, R: Tensor) -> Tensor:
    return b.double() @ R @ a.double()


@pytest.mark.parametrize("name", WEIGHTS)
def test_delta_agrees_with_sklearn(name: str) -> None:
    make, rank, limit = WEIGHTS[name]
    W = make().float()
    a, b = reference(W, rank)
    found = decompose({"w": W}, rank, Recipe(svd="reference", sklearn_signs=SKLEARN_RULE), progress=False)["w"]
    for seed in range(3):
        R = gaussian(rank, rank, seed=seed).double()
        theirs, ours = delta(a, b, R), delta(found.a, found.bt.mT, R)
        assert float((ours - theirs).norm() / theirs.norm()) <= limit
    assert defect(found.bt.mT) < 1e-6
    assert float((found.bt @ W - found.a).norm() / found.a.norm()) < 1e-6


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (100, 100)])
def test_both_sign_rules(shape: tuple[int, int]) -> None:
    W = gaussian(*shape, seed=3)
    a, b = (part.numpy() for part in reference(W, 8))
    for rule in ("rows of A", "columns of B"):
        ours = decompose({"w": W}, 8, Recipe(svd="reference", sklearn_signs=rule), progress=False)["w"]
        # Either rule by its definition, applied to what this scikit-learn gives.
        anchors = a if rule == "rows of A" else b.T
        signs = np.sign(anchors[np.arange(8), np.abs(anchors).argmax(1)])
        assert np.abs(ours.bt.numpy() - signs[:, None] * b.T).max() < 1e-3
        assert np.abs(ours.a.numpy() - signs[:, None] * a).max() < 1e-3 * np.abs(a).max()


@pytest.mark.parametrize(("n_iter", "random_state"), [(0, 42), (1, 42), (3, 7), (10, 2**32 - 1)])
def test_other_iterations_and_seeds_agree_too(n_iter: int, random_state: int) -> None:
    W = power_law(120, 90, 0.5).float()
    a, b = reference(W, 6, n_iter, random_state)
    recipe = Recipe(
        svd="reference", sklearn_signs=SKLEARN_RULE, sklearn_n_iter=n_iter, sklearn_random_state=random_state
    )
    found = decompose({"w": W}, 6, recipe, progress=False)["w"]
    R = gaussian(6, 6).double()
    theirs = delta(a, b, R)
    assert float((delta(found.a, found.bt.mT, R) - theirs).norm() / theirs.norm()) <= 1e-4


def test_its_error_is_the_reference_s_and_no_reason_to_warn() -> None:
    W = gaussian(384, 384)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decompose({"w": W}, 16, Recipe(svd="reference"), progress=False)["w"]
    true = subspace_sine(found.bt.mT, W, 16)
    assert 1e-2 < true <= found.subspace_error


def test_batched_with_others_it_is_the_same() -> None:
    stack = {str(i): power_law(96, 64, 0.3, seed=i).float() for i in range(3)}
    together = decompose(stack, 6, Recipe(svd="reference"), progress=False)
    for name, W in stack.items():
        alone = decompose({name: W}, 6, Recipe(svd="reference"), progress=False)[name]
        assert float((alone.a - together[name].a).abs().max()) < 1e-5


def test_a_stored_larger_rank_does_not_stand_in_for_a_smaller_one(tmp_path) -> None:
    weights, recipe = {"w": power_law(80, 60, 1.0).float()}, Recipe(svd="reference")
    decompose(weights, 12, recipe, cache_dir=tmp_path, progress=False)
    cached = decompose(weights, 5, recipe, cache_dir=tmp_path, progress=False)["w"]
    assert torch.equal(cached.a, decompose(weights, 5, recipe, progress=False)["w"].a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_decomposed_in_fp32(dtype: torch.dtype) -> None:
    W = power_law(64, 80, 0.5).to(dtype)
    one, two = (
        decompose({"w": weight}, 4, Recipe(svd="reference"), progress=False)["w"].a for weight in (W, W.float())
    )
    assert one.dtype == torch.float32 and torch.equal(one, two)


@pytest.mark.parametrize("sigma", ["sqrt", "B"])
def test_other_placements_give_the_same_delta(sigma: str) -> None:
    W = {"w": power_law(80, 60, 0.5).float()}
    plain = decompose(W, 5, Recipe(svd="reference"), progress=False)["w"]
    moved = decompose(W, 5, Recipe(svd="reference", sigma=sigma), progress=False)["w"]
    product = plain.bt.mT @ plain.a
    assert float((moved.bt.mT @ moved.a - product).norm() / product.norm()) < 1e-5


def test_zero_and_rank_deficient_weights() -> None:
    for W in (torch.zeros(30, 40), gaussian(60, 3) @ gaussian(3, 50, seed=1)):
        found = decompose({"w": W}, 6, Recipe(svd="reference"), progress=False)["w"]
        assert defect(found.bt.mT) < 1e-6 and bool(torch.isfinite(found.a).all())


def test_it_does_not_grow() -> None:
    W, recipe = power_law(80, 60, 1.0).float(), Recipe(svd="reference")
    small = decompose({"w": W}, 5, recipe, progress=False)["w"]
    with pytest.raises(ValueError, match="weight 'w' cannot grow from rank 5 to 8"):
        extend(small, W, 8, recipe, name="w")
    assert torch.equal(extend(small, W, 3, recipe).a, small.a[:3])


def test_only_the_top_vectors() -> None:
    with pytest.raises(ValueError, match="top vectors only, got vectors='bottom'"):
        Recipe(svd="reference", vectors="bottom")
