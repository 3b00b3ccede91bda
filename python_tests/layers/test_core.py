"""R and its sketch: initial values, what a state dict holds, when it must be compared again."""

from __future__ import annotations

import copy

import pytest
import torch

from loraxs_ext.layers import CoreMatrix, initial_core

from .helpers import make_layer


def draw(**changes):
    options = {"r": 6, "init": True, "std": 1e-5, "seed": 0, "key": "model.q", **changes}
    return initial_core(options.pop("r"), options.pop("init"), **options)


def test_initial_values_depend_on_seed_and_module_only():
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert torch.equal(first, draw())
    assert not torch.equal(first, draw(key="model.k"))
    assert not torch.equal(first, draw(seed=1))


@pytest.mark.parametrize("init, low, high", [(True, 0.8e-5, 1.2e-5), (False, 0.08, 0.12)])
def test_initial_values_have_the_stated_spread(init, low, high):
    assert low < draw(r=100, init=init).std().item() < high


def test_zeros_are_zeros():
    assert not draw(init="zeros").any()


def settled_core(**kwargs) -> CoreMatrix:
    core = CoreMatrix(torch.randn(3, 3), **kwargs)
    core.record(torch.randn(5, 3), torch.randn(3, 8), torch.randn(3, 6))
    return core


def test_state_dict_holds_r_and_sketch_only():
    assert {k: tuple(v.shape) for k, v in settled_core().state_dict().items()} == {"weight": (3, 3), "sketch": (5, 3)}


def test_state_dict_holds_the_basis_when_asked():
    core = settled_core(basis_shape=(8, 6))
    assert set(core.state_dict()) == {"weight", "sketch", "a", "bt"}
    assert core.stored_basis[0].shape == (3, 8)


def test_loading_another_sketch_unsettles():
    core, other = settled_core(), settled_core()
    core.load_state_dict(core.state_dict())
    assert core.settled
    core.load_state_dict(other.state_dict())
    assert not core.settled


def test_handing_out_the_sketch_unsettles():
    core = settled_core()
    assert core.recorded_sketch.shape == (5, 3) and core.settled
    assert core.sketch.shape == (5, 3) and not core.settled


def test_replacing_the_sketch_is_seen():
    core = settled_core()
    core.sketch = torch.zeros(5, 3)
    assert not core.recorded_sketch.any()
    assert not core.sketch.any() and not core.settled


def test_sketch_stays_fp32_when_the_model_is_cast():
    core = settled_core()
    before = core.recorded_sketch.clone()
    core.to(torch.bfloat16)
    assert core.weight.dtype == torch.bfloat16
    assert torch.equal(core.recorded_sketch, before)


def test_an_unfinished_basis_counts_as_none():
    core = CoreMatrix(torch.zeros(3, 3), (8, 6))
    assert core.stored_basis is None


def test_unsettled_layer_settles_before_it_computes():
    layer = make_layer()
    policy = layer.basis_policy["default"]
    before = policy.calls
    _ = layer.loraxs_R["default"].sketch
    layer(torch.randn(2, 24))
    layer(torch.randn(2, 24))
    assert policy.calls == before + 1


def test_train_and_eval_settle():
    layer = make_layer()
    _ = layer.loraxs_R["default"].sketch
    layer.eval()
    assert layer.loraxs_R["default"].settled


def test_copies_stay_settled_and_independent():
    layer = make_layer()
    twin = copy.deepcopy(layer)
    twin.loraxs_R["default"].weight.data.zero_()
    x = torch.randn(2, 24)
    assert twin.loraxs_R["default"].settled
    assert not torch.equal(layer(x), twin(x))
