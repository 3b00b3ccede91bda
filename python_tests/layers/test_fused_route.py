"""`fuse`: the same numbers with fewer looks and fewer calls, and None wherever a look is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn

from loraxs_ext import LoraXSConfig
from loraxs_ext.layers import LoraXSLinear, Route, Rows, following, fuse


def layer_of(base: nn.Linear | None = None, **options: object) -> LoraXSLinear:
    torch.manual_seed(0)
    model = nn.Sequential(base or nn.Linear(12, 10))
    config = LoraXSConfig(r=3, target_modules=["0"], init_weights=False, **options)
    layer = get_peft_model(model, config).eval().base_model.model[0]
    assert isinstance(layer, LoraXSLinear)
    return layer


@pytest.fixture
def route() -> Route:
    return Route(Rows(torch.tensor([1, -1, 0], dtype=torch.int32)), torch.randn(2, 3, 3), "default", scale=0.5)


@pytest.mark.parametrize("tokens", [1, 4])
@torch.no_grad()
def test_the_same_numbers(route: Route, tokens: int):
    layer, x = layer_of(), torch.randn(3, tokens, 12)
    layer.route = route
    expected = layer(x)
    fuse({layer: route})
    with following({layer: route}):
        assert layer.fused is not None and torch.equal(layer(x), expected)
        # A server puts other slots in their place.
        route.rows.slots = torch.tensor([-1, -1, -1], dtype=torch.int32)
        torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert layer.fused is None


def test_gradients_of_a_weight_that_is_trained(route: Route):
    layer, x = layer_of(), torch.randn(3, 12)
    layer.base_layer.weight.requires_grad_(True)
    fuse({layer: route})
    with following({layer: route}):
        layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None


@torch.no_grad()
def test_what_changes_meanwhile_counts(route: Route):
    layer, x = layer_of(), torch.randn(3, 12)
    fuse({layer: route})
    with following({layer: route}):
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))
        with following({layer: route}):
            assert torch.equal(layer(x), layer.base_layer(x))


@torch.no_grad()
def test_hooks_that_come_meanwhile_are_called(route: Route):
    layer, x = layer_of(), torch.randn(3, 12)
    fuse({layer: route})
    with following({layer: route}):
        plain = layer(x)
        for register in (layer.register_forward_hook, nn.modules.module.register_module_forward_hook):
            handle = register(lambda module, args, y: 2 * y if module is layer else None)
            torch.testing.assert_close(layer(x), 2 * plain)
            handle.remove()
        assert torch.equal(layer(x), plain)


def hooked() -> LoraXSLinear:
    layer = layer_of()
    layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


class OtherLinear(nn.Linear):
    """Computes something else, as quantised layers do."""


@pytest.mark.parametrize("make", [hooked, lambda: layer_of(OtherLinear(12, 10))], ids=["hook", "subclass"])
def test_none_where_forward_has_to_look(route: Route, make: Callable[[], LoraXSLinear]):
    fuse({make(): route})
    assert route.fused is None


def test_none_for_dropout_and_for_the_base_model(route: Route):
    layer = layer_of()
    route.p_drop = 0.5
    fuse({layer: route})
    assert route.fused is None
    base_rows = Route(route.rows, None, "__base__")
    fuse({layer: base_rows})
    assert base_rows.fused is None
