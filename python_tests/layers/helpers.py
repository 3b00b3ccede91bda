"""One layer with an exact basis, without the rooms that compute bases for a whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraxs_ext.layers import LoraXSLayer, LoraXSLinear

K, N = 24, 20


class ExactPolicy:
    """A BasisPolicy that decomposes the weight and believes every R."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.calls = 0

    def settle(self, layer: LoraXSLayer) -> None:
        self.calls += 1
        if layer.basis_rank < layer.r[self.adapter]:
            weight = layer.frozen_weight().double()
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            signs = u.sum(0).sign()
            layer.set_basis(s[:, None] * vh * signs[:, None], (u * signs).mT)
        layer.loraxs_R[self.adapter].settled = True
        layer.settle_magnitudes(layer.frozen_weight)


def make_layer(base: nn.Module | None = None, adapter: str = "default", r: int = 4, **options) -> LoraXSLinear:
    """A layer over `base` (a frozen nn.Linear of shape [N, K] if None) whose R clearly changes the output."""
    torch.manual_seed(0)
    base = nn.Linear(K, N) if base is None else base
    base.requires_grad_(False)
    options = {"r": r, "lora_alpha": 8.0, "init_weights": False, **options}
    layer = LoraXSLinear(base, f"model.{adapter}", adapter, {}, policy=ExactPolicy(adapter), **options)
    layer.settle(adapter)
    return layer


def add(layer: LoraXSLinear, adapter: str, r: int, **options) -> None:
    """One more adapter with another R."""
    options = {"lora_alpha": 8.0, "init_weights": False, "init_seed": len(layer.r), **options}
    layer.update_layer(adapter, r, policy=ExactPolicy(adapter), **options)
    layer.settle(adapter)


def dense_delta(layer: LoraXSLinear, adapter: str) -> Tensor:
    """s·B R A [N, K] in fp64, from its definition."""
    r = layer.r[adapter]
    b, a = layer.loraxs_Bt[:r].double().mT, layer.loraxs_A[:r].double()
    return layer.scaling[adapter] * b @ layer.loraxs_R[adapter].weight.detach().double() @ a


def base_weight(layer: LoraXSLinear) -> Tensor:
    """W [N, K] in fp64."""
    return layer.frozen_weight().double()


def expected_output(layer: LoraXSLinear, x: Tensor, *adapters: str) -> Tensor:
    """x (W + Σ ΔW)ᵀ + bias in fp64."""
    weight = base_weight(layer) + sum(dense_delta(layer, name) for name in adapters)
    bias = layer.get_base_layer().bias
    return x.double() @ weight.mT + (0 if bias is None else bias.double())
