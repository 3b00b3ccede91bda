"""One EDoRA layer against its definition: y = ((m / ‖W + sBRA‖) ∘ (W + sBRA)) x + bias, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraxs_ext.layers import LoraXSLinear, routed
from loraxs_ext.layers.edora import RowNorms

from ..ops.problems import assert_within_twice
from .helpers import K, N, add, base_weight, dense_delta, make_layer

NORMS = ["detached", "differentiated"]


def edora(norm: str = "detached", dtype: torch.dtype = torch.float64, base: nn.Module | None = None, **options):
    """A layer whose m is another one than the lengths of W's rows."""
    layer = make_layer((nn.Linear(K, N) if base is None else base).to(dtype), magnitude=norm, **options)
    stretch(layer, "default")
    return layer


def stretch(layer: LoraXSLinear, adapter: str) -> None:
    m = layer.loraxs_magnitude[adapter].weight
    with torch.no_grad():
        m.mul_(torch.linspace(0.5, 1.5, len(m)).to(m))


def leaves(layer: LoraXSLinear) -> tuple[Tensor, Tensor]:
    return layer.loraxs_R["default"].weight, layer.loraxs_magnitude["default"].weight


def definition(layer: LoraXSLinear, x: Tensor, core: Tensor, m: Tensor, norm: str = "detached") -> Tensor:
    """In the dtype of x, on the dense weight."""
    a, b = (part.to(x.dtype) for part in layer.get_basis("default"))
    moved = layer.frozen_weight().to(x.dtype) + layer.scaling["default"] * b @ core @ a
    lengths = moved.norm(dim=1)
    g = m / (lengths.detach() if norm == "detached" else lengths)
    bias = layer.get_base_layer().bias
    return F.linear(x, g[:, None] * moved, None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", [nn.Linear, Conv1D])
def test_it_is_the_definition_in_fp64(base, bias):
    if base is Conv1D and not bias:
        pytest.skip("Conv1D has a bias")
    layer = edora(base=Conv1D(N, K) if base is Conv1D else nn.Linear(K, N, bias=bias))
    x = torch.randn(3, 5, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), definition(layer, x, *leaves(layer)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_definition(norm):
    layer = edora(norm)
    x, dy = torch.randn(7, K, dtype=torch.float64, requires_grad=True), torch.randn(7, N, dtype=torch.float64)
    inputs = (x, *leaves(layer))
    ours = torch.autograd.grad(layer(x), inputs, dy)
    expected = torch.autograd.grad(definition(layer, *inputs, norm), inputs, dy)
    for got, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


def test_gradcheck_with_the_norm_differentiated():
    layer = edora("differentiated")
    core, m = leaves(layer)

    def call(x: Tensor, new_core: Tensor, new_m: Tensor) -> Tensor:
        # Parameters are leaves, and gradcheck has its own: they are exchanged for the call.
        names = {"loraxs_R.default.weight": new_core, "loraxs_magnitude.default.weight": new_m}
        return torch.func.functional_call(layer, names, (x,))

    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, core.detach().requires_grad_(), m.detach().requires_grad_()))


def test_error_in_fp32_within_twice_the_dense_formula():
    layer = edora(dtype=torch.float32)
    x, dy = torch.randn(64, K, requires_grad=True), torch.randn(64, N)
    inputs = (x, *leaves(layer))
    found = {"ours": layer(x), "plain": definition(layer, *inputs)}
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact = definition(layer, *wide)
    truth = (exact.detach(), *torch.autograd.grad(exact, wide, dy.double()))
    ours, plain = ((y.detach(), *torch.autograd.grad(y, inputs, dy)) for y in found.values())
    for name, *three in zip(("y", "dx", "dR", "dm"), ours, plain, truth, strict=True):
        assert_within_twice(*three, name)


@pytest.mark.parametrize("opaque", [False, True], ids=["fused", "opaque"])
def test_dropout_reaches_the_correction_only(opaque):
    base = Conv1D(N, K) if opaque else nn.Linear(K, N)
    layer = edora(base=base, dropout=0.4).train()
    x = torch.randn(9, K, dtype=torch.float64)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    # The reference's forward pass: y = base(x) + (g − 1) (x' Wᵀ) + g s·B R A x'.
    weight, delta = base_weight(layer), dense_delta(layer, "default")
    g = leaves(layer)[1].detach() / (weight + delta).norm(dim=1)
    expected = F.linear(x, weight, base.bias) + (g - 1) * (dropped @ weight.mT) + g * (dropped @ delta.mT)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, layer(x))
    torch.testing.assert_close(layer.eval()(x), definition(layer, x, *leaves(layer)), rtol=1e-12, atol=1e-12)


def test_a_smaller_rank_is_cut_exactly():
    layer = edora(r=9)
    add(layer, "narrow", 2, magnitude="detached")
    stretch(layer, "narrow")
    a, b = layer.get_basis("narrow")
    measured = RowNorms.measure(layer.frozen_weight(), a, torch.float64)
    for name, kept in layer.loraxs_norms["2"].named_buffers():
        torch.testing.assert_close(kept.abs(), getattr(measured, name).abs(), rtol=1e-12, atol=1e-13)
    weight = base_weight(layer) + dense_delta(layer, "narrow")
    weight *= (layer.loraxs_magnitude["narrow"].weight.detach() / weight.norm(dim=1))[:, None]
    layer.set_adapter("narrow")
    x = torch.randn(5, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base_layer.bias), rtol=1e-12, atol=1e-13)


def test_a_basis_that_is_not_converged():
    layer = edora()
    layer.set_basis(torch.randn(4, K), torch.randn(4, N))
    layer.settle("default")
    x = torch.randn(5, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), definition(layer, x, *leaves(layer)), rtol=1e-12, atol=1e-12)


def test_the_weight_is_read_by_the_base_product_only():
    layer = edora(dtype=torch.float32)
    x = torch.randn(4, K)
    before = layer(x).detach()
    weight = layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    g = leaves(layer)[1].detach() / (weight.double() + dense_delta(layer, "default")).norm(dim=1)
    # The norm is that of the weight there was: nothing in a forward pass looks at the weight for it.
    missing = g * (x.double() @ weight.double().mT)
    torch.testing.assert_close(layer(x).double() + missing, before.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opaque", [False, True], ids=["fused", "opaque"])
def test_mixed_rows(opaque):
    layer = edora(base=Conv1D(N, K) if opaque else None)
    add(layer, "plain", 6)
    add(layer, "narrow", 2, magnitude="detached")
    stretch(layer, "narrow")
    names = ["plain", "__base__", "narrow", "default"]
    x = torch.randn(4, 3, K, dtype=torch.float64)
    with torch.no_grad(), routed([layer], names):
        mixed = layer(x)
    for row, name in enumerate(names):
        weight = base_weight(layer) + (0 if name == "__base__" else dense_delta(layer, name))
        if name in layer.loraxs_magnitude:
            weight = weight * (layer.loraxs_magnitude[name].weight.detach() / weight.norm(dim=1))[:, None]
        expected = F.linear(x[row], weight, layer.get_base_layer().bias)
        torch.testing.assert_close(mixed[row], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_without_a_break(norm):
    layer = edora(norm, torch.float32)
    x = torch.randn(6, K, requires_grad=True)
    inputs = (x, *leaves(layer))
    eager = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    dy = torch.randn(6, N)
    for ours, theirs in zip(torch.autograd.grad(compiled, inputs, dy), torch.autograd.grad(eager, inputs, dy),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_a_row_of_zeros_stays_one():
    base = nn.Linear(K, N).double()
    with torch.no_grad():
        base.weight[3] = 0
    layer = make_layer(base, magnitude="detached", init_weights="zeros")
    x = torch.randn(5, K, dtype=torch.float64)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, F.linear(x, base.weight, base.bias))
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves(layer))


def test_other_dtypes_measure_the_norms_again():
    layer = edora(dtype=torch.float32)
    layer.double()
    assert not layer.loraxs_norms
    x = torch.randn(5, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), definition(layer, x, *leaves(layer)), rtol=1e-12, atol=1e-12)
    assert layer.loraxs_norms["4"].rho.dtype == torch.float64
