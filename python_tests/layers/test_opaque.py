"""Base layers that show their weight only when they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loraxs_ext.layers import LoraXSOpaque, routed

from .helpers import ExactPolicy, add, dense_delta, make_layer

K, N = 300, 20


class Secret(nn.Module):
    """x Wᵀ + c, with W in two packed halves; N is not declared."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features = K
        self.dropout = nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("high", torch.randn(N, K, generator=generator, dtype=dtype))
        self.register_buffer("bias", torch.randn(N, generator=generator, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) @ self.high.mT + self.bias


class Rectified(Secret):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Rounded(Secret):
    """Activations in 8 bits, without autograd."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
            return super().forward((x / scale).round() * scale)


def make(base: nn.Module, **options) -> LoraXSOpaque:
    return make_layer(base, layer_class=LoraXSOpaque, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_is_found_in_eval_mode_and_the_mode_is_restored(dtype):
    base = Secret(dtype).train()
    base.dropout.eval()
    layer = make(base)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(layer.frozen_weight(), base.high, rtol=tolerance, atol=tolerance)
    assert base.training and not base.dropout.training and (layer.in_features, layer.out_features) == (K, N)


def test_forward_gradient_and_mixed_batch():
    layer = make(Secret().eval())
    add(layer, "large", 7)
    x = torch.randn(2, 3, K, requires_grad=True)
    weights = {name: layer.base_layer.high.double() + dense_delta(layer, name) for name in layer.r}
    weights["__base__"] = layer.base_layer.high.double()
    y = layer(x)
    torch.testing.assert_close(
        y.double(), x.double() @ weights["default"].mT + layer.base_layer.bias, rtol=1e-4, atol=1e-3
    )
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx.double(), weights["default"].sum(0).expand_as(dx), rtol=1e-4, atol=1e-3)
    names = ["large", "__base__"]
    with routed([layer], names):
        mixed = layer(x)
    for row, name in enumerate(names):
        alone = x[row].double() @ weights[name].mT + layer.base_layer.bias
        torch.testing.assert_close(mixed[row].double(), alone, rtol=1e-4, atol=1e-3)


def test_rounded_activations_pass_and_get_a_gradient():
    layer = make(Rounded().eval())
    x = torch.randn(4, K, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    expected = (layer.base_layer.high.double() + dense_delta(layer, "default")).sum(0).expand_as(dx)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-3, atol=0.05)


def test_merge_is_refused():
    layer = make(Secret())
    with pytest.raises(TypeError, match="expected a weight to merge into, got Secret"):
        layer.merge()
    assert not layer.merged


def test_what_is_not_linear_is_refused_with_numbers():
    with pytest.raises(
        TypeError, match=r"got Rectified, which is not: its output differs .* by 0\.\d+, accepted up to"
    ):
        make(Rectified())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.LayerNorm(4), "expected a linear layer, or a linear module with in_features, got LayerNorm"),
        (nn.LSTM(4, 4), r"expected a layer that maps \[M, K\] to \[M, N\], got LSTM, which maps \[1, 4\] to tuple"),
    ],
    ids=["undeclared", "tuple"],
)
def test_what_is_no_layer_of_that_kind_is_refused(base, message):
    with pytest.raises(TypeError, match=message):
        LoraXSOpaque(base, "model.x", "default", {}, r=2, lora_alpha=2.0, policy=ExactPolicy("default"))
