"""The layer on a GPU: the dense model, mixed batches, training, compile, and siblings that share a projection."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraxs_ext import ops
from loraxs_ext.layers import linear as linear_module
from loraxs_ext.layers import routed, share_projections
from loraxs_ext.layers import stacked as stacked_module

from ..layers.helpers import K, N, add, expected_output, make_layer

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE.get(got.dtype, 1e-10)
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@devices
@every_dtype
def test_forward_and_mixed_batch(device, dtype):
    layer = make_layer(nn.Linear(K, N, dtype=dtype, device=device))
    add(layer, "other", 3)
    x = torch.randn(3, 70, K, dtype=dtype, device=device)
    close(layer(x), expected_output(layer, x, "default"))
    with torch.no_grad(), routed([layer], ["other", "__base__", "default"]):
        y = layer(x)
    close(y[0], expected_output(layer, x[0], "other"))
    close(y[1], expected_output(layer, x[1]))
    close(y[2], expected_output(layer, x[2], "default"))


@devices
def test_gradients(device):
    layer = make_layer(nn.Linear(K, N, device=device))
    x = torch.randn(50, K, device=device, requires_grad=True)
    core = layer.loraxs_R["default"].weight
    got = torch.autograd.grad(layer(x).square().sum(), (x, core))
    leaves = x.detach().double().requires_grad_(), core.detach().double().requires_grad_()
    r = layer.r["default"]
    delta = layer.scaling["default"] * layer.loraxs_Bt[:r].double().mT @ leaves[1] @ layer.loraxs_A[:r].double()
    base = layer.base_layer
    y = nn.functional.linear(leaves[0], base.weight.double() + delta, base.bias.double())
    for ours, exact in zip(got, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@devices
def test_compiled_in_one_graph(device):
    layer = make_layer(nn.Linear(K, N, device=device))
    x = torch.randn(7, K, device=device)
    with torch.no_grad():
        close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@devices
@every_dtype
def test_siblings_share_a_projection(device, dtype, monkeypatch):
    monkeypatch.setattr(linear_module, "SHARE_ON_CPU", device == "cpu")
    seen = []
    project = ops.project
    monkeypatch.setattr(ops, "project", lambda x, a: seen.append(a.shape[0]) or project(x, a))
    tokens = stacked_module.ALONE_TOKENS + 1
    model = nn.ModuleDict({name: make_layer(nn.Linear(K, N, dtype=dtype, device=device)) for name in "qkv"})
    share_projections(model)
    for _ in range(2):
        x = torch.randn(tokens, K, dtype=dtype, device=device)
        for layer in model.values():
            close(layer(x), expected_output(layer, x, "default"))
    assert seen == [12, 12]


@devices
def test_siblings_on_two_streams_do_not_share(device, monkeypatch):
    if device == "cpu":
        pytest.skip("the CPU has one stream")
    model = nn.ModuleDict({name: make_layer(nn.Linear(K, N, device=device)) for name in "qk"})
    share_projections(model)
    x = torch.randn(stacked_module.ALONE_TOKENS + 1, K, device=device)
    model["q"](x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    seen = []
    project = ops.project
    monkeypatch.setattr(ops, "project", lambda x, a: seen.append(a.shape[0]) or project(x, a))
    with torch.cuda.stream(side):
        y = model["k"](x)
    torch.cuda.current_stream().wait_stream(side)
    close(y, expected_output(model["k"], x, "default"))
    assert model["k"].siblings is None and not seen
