"""Mixed batches: every row is served as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraxs_ext.layers import BASE, build_route, routed
from loraxs_ext.layers.routing import Route, Rows

from .helpers import K, N, add, expected_output, make_layer

NAMES = ["default", BASE, "wide", "default", "absent"]


@pytest.fixture(params=[lambda: nn.Linear(K, N), lambda: Conv1D(N, K)], ids=["linear", "conv1d"])
def layer(request):
    layer = make_layer(request.param(), r=3).eval()
    add(layer, "wide", 6)
    return layer


def rows_expected(layer, x, names):
    used = [[name] if name in layer.r else [] for name in names]
    return torch.stack([expected_output(layer, row, *adapters) for row, adapters in zip(x, used, strict=True)])


@pytest.mark.parametrize("lead", [(5,), (5, 1), (5, 7), (5, 2, 3)], ids=str)
def test_each_row_uses_its_adapter(layer, lead):
    x = torch.randn(*lead, K)
    with routed([layer], NAMES):
        y = layer(x)
    torch.testing.assert_close(y.double(), rows_expected(layer, x, NAMES), rtol=1e-5, atol=1e-5)


def test_base_rows_are_the_base_rows_whatever_the_others_are(layer):
    x = torch.randn(3, 4, K)
    with routed([layer], [BASE, "default", BASE]):
        y = layer(x)
    with routed([layer], [BASE, "wide", BASE]):
        again = layer(x)
    base = layer.base_layer(x)
    for row in (0, 2):
        assert torch.equal(y[row], again[row])
        torch.testing.assert_close(y[row], base[row])
    assert not torch.allclose(y[1], again[1])


def test_only_base_rows(layer):
    x = torch.randn(2, K)
    with routed([layer], [BASE, "absent"]):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_rows_repeated_over_beams_keep_their_adapter(layer):
    x = torch.randn(5, 4, K)
    beams = x.repeat_interleave(3, dim=0)
    with routed([layer], NAMES):
        alone, together = layer(x), layer(beams)
    torch.testing.assert_close(together, alone.repeat_interleave(3, dim=0))


def test_what_a_route_keeps_follows_its_slots_and_the_basis(layer):
    x = torch.randn(2, 3, K)
    with routed([layer], ["default", "wide"]):
        for change in ("nothing", "slots in place", "other slots", "other rows", "basis"):
            if change == "slots in place":
                layer.route.rows.slots.copy_(torch.tensor([-1, 0]))
            elif change == "other slots":
                layer.route.rows.slots = torch.tensor([1, -1], dtype=torch.int32)
            elif change == "other rows":
                x = torch.randn(4, 3, K)
            elif change == "basis":
                layer.set_basis(-2 * layer.loraxs_A, layer.loraxs_Bt)
            got = layer(x)
            fresh = Route(Rows(layer.route.rows.slots.clone()), layer.route.pages, layer.route.adapter)
            kept, layer.route = layer.route, fresh
            assert torch.equal(layer(x), got), change
            layer.route = kept


def test_a_route_makes_nothing_twice(layer):
    x = torch.randn(6, 2, K)
    with routed([layer], ["default", "wide"]):
        first, second = layer.paths(x)[0], layer.paths(x)[0]
        assert first.a is second.a and first.b is second.b and first.slots is second.slots
        with torch.inference_mode():
            layer.route.rows.slots = layer.route.rows.slots.clone()
        assert layer.paths(x)[0].slots is not layer.paths(x)[0].slots


def test_one_slot_per_token(layer):
    names = ["default", "wide", BASE, "wide"]
    x = torch.randn(1, 4, K)
    with routed([layer], names):
        y = layer(x)
    torch.testing.assert_close(y[0].double(), rows_expected(layer, x[0], names), rtol=1e-5, atol=1e-5)


def test_slots_are_int32_and_pages_carry_the_scaling(layer):
    route = build_route(layer, NAMES)
    assert route.rows.slots.dtype == torch.int32 and route.rows.slots.tolist() == [0, -1, 1, 0, -1]
    assert route.pages.shape == (2, 6, 6)
    torch.testing.assert_close(route.pages[0, :3, :3], layer.scaling["default"] * layer.get_R("default"))
    assert not route.pages[0, 3:].any()


def test_batch_that_does_not_fit_is_refused(layer):
    # 20 tokens would divide by 5 names, but they belong to 2 rows.
    for shape in ((4, K), (2, 10, K)):
        with routed([layer], NAMES), pytest.raises(ValueError, match="got 5 for an input of shape"):
            layer(torch.randn(shape))


def test_merged_layers_are_refused(layer):
    layer.merge()
    with pytest.raises(ValueError, match="when there are merged adapters"), routed([layer], NAMES):
        pass


def test_route_ends_with_its_context(layer):
    x = torch.randn(5, K)
    with pytest.raises(KeyError), routed([layer], NAMES):
        raise KeyError
    assert layer.route is None
    torch.testing.assert_close(layer(x).double(), expected_output(layer, x, "default"), rtol=1e-5, atol=1e-5)


def test_routed_layer_compiles(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, K)
    with routed([layer], NAMES), torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
