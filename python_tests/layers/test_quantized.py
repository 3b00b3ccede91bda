"""Quantised base layers: through PEFT's backends, with a toy one that keeps state beside its weight as real ones do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraxs_ext.layers import layer as layer_module

from .helpers import K, N, base_weight, dense_delta, expected_output, make_layer


class Int8Linear(nn.Linear):
    """Weight [N, K] as int8 with one scale per row."""

    def __init__(self) -> None:
        super().__init__(K, N)
        self.quantize(self.weight.detach())

    def quantize(self, weight: Tensor) -> None:
        """Store `weight`."""
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias with the dequantised weight."""
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Int8Backend:
    """What PEFT's backends do."""

    backend_name, layer_type, supports_merge = "toy int8", "linear", True

    def get_base_weight(self, base: Int8Linear) -> Tensor:
        """W in fp32."""
        return base.weight.float() * base.scale

    def set_base_weight(self, peft_layer, weight: Tensor) -> None:
        """Quantise anew."""
        peft_layer.get_base_layer().quantize(weight)


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(layer_module, "resolve_quantization_backend", lambda base, **_: Int8Backend())
    torch.manual_seed(0)
    return make_layer(Int8Linear())


def test_forward_adds_to_the_quantised_layer(layer):
    x = torch.randn(5, K)
    assert layer.loraxs_A.dtype == torch.float32
    torch.testing.assert_close(layer(x).double(), expected_output(layer, x, "default"), rtol=1e-5, atol=1e-5)


def test_merge_quantises_once_more_and_unmerge_restores_weight_and_state(layer):
    x = torch.randn(5, K)
    before = layer(x)
    base, state = layer.base_layer, {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    with pytest.warns(UserWarning, match="rounding the merged weight changes"):
        layer.loraxs_R["default"].weight.data.mul_(1e-2)
        layer.merge()
    layer.unmerge()
    layer.loraxs_R["default"].weight.data.mul_(1e2)
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=0.05, atol=0.2)
    assert layer.base_layer is not base
    layer.unmerge()
    assert layer.base_layer is base and all(torch.equal(v, state[k]) for k, v in base.state_dict().items())
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


def test_merged_layer_still_knows_its_frozen_weight(layer):
    weight = layer.frozen_weight().clone()
    layer.merge()
    assert torch.equal(layer.frozen_weight(), weight)
    assert not torch.equal(layer.get_base_weight(), weight)


def test_failed_requantisation_leaves_the_layer_as_it_was(layer, monkeypatch):
    x = torch.randn(5, K)
    before, base = layer(x), layer.base_layer

    def refuse(self, peft_layer, weight):
        raise TypeError("no")

    monkeypatch.setattr(Int8Backend, "set_base_weight", refuse)
    with pytest.raises(TypeError, match="no"):
        layer.merge()
    assert layer.base_layer is base and not layer.merged and not layer.unmerged_base
    assert torch.equal(layer(x), before)


def test_base_layers_without_autograd_pass_the_gradient_of_their_weight(layer):
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    expected = torch.autograd.grad(layer(x), [x, layer.loraxs_R["default"].weight], dy)
    forward = layer.base_layer.forward
    layer.base_layer.forward = torch.no_grad()(forward)
    found = torch.autograd.grad(layer(x), [x, layer.loraxs_R["default"].weight], dy)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_edora_has_the_norms_of_the_dequantised_weight(monkeypatch):
    monkeypatch.setattr(layer_module, "resolve_quantization_backend", lambda base, **_: Int8Backend())
    layer = make_layer(Int8Linear(), magnitude="detached")
    m = layer.loraxs_magnitude["default"].weight
    torch.testing.assert_close(m.detach(), layer.frozen_weight().norm(dim=1))
    with torch.no_grad():
        m.mul_(torch.linspace(0.5, 1.5, N))
    x = torch.randn(5, K)
    weight = base_weight(layer) + dense_delta(layer, "default")
    weight *= (m.detach() / weight.norm(dim=1))[:, None]
    expected = F.linear(x.double(), weight, layer.get_base_layer().bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
