"""Embeddings: rows of W + s·B R A, with the options of nn.Embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraxs_ext.layers import LoraXSEmbedding, routed

from .helpers import ExactPolicy, add, dense_delta, make_layer

V, D = 30, 12


def make(base: nn.Embedding | None = None, **options) -> LoraXSEmbedding:
    """A layer over `base` whose R clearly changes the output."""
    torch.manual_seed(0)
    base = nn.Embedding(V, D) if base is None else base
    return make_layer(base, layer_class=LoraXSEmbedding, **options)


def adapted(layer: LoraXSEmbedding, adapter: str = "default") -> Tensor:
    """W + ΔW [V, d] in fp64; the padding row has no ΔW."""
    delta = dense_delta(layer, adapter)
    if layer.get_base_layer().padding_idx is not None:
        delta[layer.get_base_layer().padding_idx] = 0
    return layer.frozen_weight().double() + delta


def indices(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (2, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_of_the_adapted_weight(shape, dtype):
    torch.manual_seed(0)
    layer = make(nn.Embedding(V, D, dtype=dtype))
    x = indices(*shape)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.05}[dtype]
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), F.embedding(x, adapted(layer)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_gradient_is_that_of_the_embedding_carried_to_R(options):
    layer = make(nn.Embedding(V, D, **options))
    x = torch.cat([indices(4, 5), torch.full((1, 5), 3), torch.full((1, 5), 7)])
    dy = torch.randn(*x.shape, D)
    layer(x).backward(dy)
    twin = nn.Embedding(V, D, **options)
    twin.weight.data = adapted(layer).float()
    twin(x).backward(dy)
    b, a = layer.loraxs_Bt[:4].mT, layer.loraxs_A[:4]
    expected = layer.scaling["default"] * b.mT @ twin.weight.grad @ a.mT
    torch.testing.assert_close(layer.loraxs_R["default"].weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_padding_row_stays_as_it_is():
    base = nn.Embedding(V, D, padding_idx=3)
    base.weight.data[3] = torch.randn(D)
    layer = make(base)
    pad = torch.tensor([3])
    assert torch.equal(layer(pad)[0], base.weight[3])
    layer.merge()
    assert torch.equal(layer(pad)[0], base.weight[3]) and not layer.get_delta_weight("default")[3].any()


def test_scaled_embeddings_scale_the_adapter_too():
    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(V, D)
            self.register_buffer("embed_scale", torch.tensor(3.5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.embed_scale

    layer = make(Scaled())
    x = indices(4, 5)
    y = layer(x)
    torch.testing.assert_close(y.double(), 3.5 * F.embedding(x, adapted(layer)), rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


def test_max_norm_bounds_the_base_and_forbids_merging():
    layer = make(nn.Embedding(V, D, max_norm=1.0))
    x = indices(4, 5)
    y = layer(x)
    assert (layer.frozen_weight()[x].norm(dim=-1) < 1 + 1e-5).all()
    torch.testing.assert_close(y.double(), F.embedding(x, adapted(layer)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected an embedding without max_norm to merge into"):
        layer.merge()


def test_merge_unmerge_disable():
    layer = make()
    x = indices(4, 5)
    y, weight = layer(x), layer.frozen_weight().clone()
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, weight) and torch.equal(layer(x), y)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), F.embedding(x, weight))


def test_mixed_batch_equals_each_row_alone():
    layer = make()
    add(layer, "large", 7)
    x, names = indices(6, 5), ["default", "large", "__base__"]
    with routed([layer], names):
        mixed = layer(x)
    for row, name in enumerate(name for name in names for _ in range(2)):
        weight = layer.frozen_weight().double() if name == "__base__" else adapted(layer, name)
        torch.testing.assert_close(mixed[row].double(), F.embedding(x[row], weight), rtol=1e-5, atol=1e-5)


def test_dropout_does_not_apply():
    layer = make(dropout=0.5).train()
    x = indices(4, 5)
    assert torch.equal(layer(x), layer(x))


def test_nothing_of_the_size_of_the_weight_is_made():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
                self.size = max(self.size, out.numel())
            return out

    layer = make(nn.Embedding(1000, D))
    x = indices(2, 3)
    with Largest() as largest:
        layer(x).sum().backward()
    assert largest.size <= 6 * D


def test_embeddings_called_with_something_else_are_refused():
    class Positions(nn.Embedding):
        def forward(self, mask: Tensor) -> Tensor:
            return super().forward(mask.cumsum(-1))

    with pytest.raises(TypeError, match="expected torch.nn.Embedding, called with indices, got Positions"):
        LoraXSEmbedding(Positions(V, D), "wpe", "default", {}, r=2, lora_alpha=2.0, policy=ExactPolicy("default"))
