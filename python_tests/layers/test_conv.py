"""Convolutions with kernel 1, as linear layers over channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loraxs_ext.layers import LoraXSConv, routed

from .helpers import ExactPolicy, add, dense_delta, make_layer

K, N = 12, 10


def make(base: nn.Module, **options) -> LoraXSConv:
    """A layer over `base` whose R clearly changes the output."""
    return make_layer(base, layer_class=LoraXSConv, **options)


def expected(layer: LoraXSConv, x: Tensor, adapter: str = "default") -> Tensor:
    """The convolution with W + ΔW, in fp64."""
    base = layer.get_base_layer()
    weight = base.weight.double() + dense_delta(layer, adapter).reshape(base.weight.shape)
    operation = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[base.weight.ndim - 3]
    return operation(x.double(), weight, None if base.bias is None else base.bias.double(), base.stride)


CASES = {
    "1d": (nn.Conv1d(K, N, 1), (2, K, 7)),
    "2d": (nn.Conv2d(K, N, 1), (2, K, 5, 7)),
    "3d": (nn.Conv3d(K, N, 1), (2, K, 3, 4, 5)),
    "stride": (nn.Conv2d(K, N, 1, stride=(2, 3)), (2, K, 5, 7)),
    "no bias": (nn.Conv2d(K, N, 1, bias=False, padding="same"), (2, K, 5, 7)),
    "without batch": (nn.Conv2d(K, N, 1), (K, 5, 7)),
    "empty": (nn.Conv2d(K, N, 1), (0, K, 5, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_output_gradient_and_merge(name):
    base, shape = CASES[name]
    layer = make(base)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, layer.loraxs_R["default"].weight], dy)
    reference = torch.autograd.grad(expected_with_grad(layer, x), [x, layer.loraxs_R["default"].weight], dy.double())
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    weight = base.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert torch.equal(base.weight, weight) and torch.equal(layer(x), y)


def expected_with_grad(layer: LoraXSConv, x: Tensor) -> Tensor:
    """`expected`, differentiable in R."""
    base, r = layer.get_base_layer(), layer.r["default"]
    b, a = layer.loraxs_Bt[:r].double().mT, layer.loraxs_A[:r].double()
    delta = layer.scaling["default"] * b @ layer.loraxs_R["default"].weight.double() @ a
    weight = base.weight.double() + delta.reshape(base.weight.shape)
    operation = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[base.weight.ndim - 3]
    return operation(x.double(), weight, None if base.bias is None else base.bias.double(), base.stride)


def test_channels_last_stays_channels_last():
    layer = make(nn.Conv2d(K, N, 1).to(memory_format=torch.channels_last))
    x = torch.randn(2, K, 5, 7).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_mixed_batch_equals_each_row_alone():
    layer = make(nn.Conv2d(K, N, 1))
    add(layer, "large", 7)
    x, names = torch.randn(3, K, 5, 7), ["large", "__base__", "default"]
    with routed([layer], names):
        mixed = layer(x)
    for row, name in enumerate(names):
        alone = layer.base_layer(x[row : row + 1]).double()
        if name != "__base__":
            alone = expected(layer, x[row : row + 1], name)
        torch.testing.assert_close(mixed[row : row + 1].double(), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "got"),
    [
        (nn.Conv2d(K, K, 3), r"kernel_size \(3, 3\)"),
        (nn.Conv2d(K, K, 1, groups=2), "groups 2"),
        (nn.Conv1d(K, K, 1, padding=1), r"padding \(1,\)"),
    ],
    ids=["kernel", "groups", "padding"],
)
def test_other_convolutions_are_refused(base, got):
    with pytest.raises(TypeError, match=f"expected a convolution of kernel_size 1, groups 1 and padding 0.*{got}"):
        LoraXSConv(base, "conv", "default", {}, r=2, lora_alpha=2.0, policy=ExactPolicy("default"))
