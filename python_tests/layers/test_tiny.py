"""R = Σ v_k P_k: what is drawn, what is shared, what a state dict holds, what stays put when models are cast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraxs_ext.layers import TinyCore, TinyOptions, group_of, routed, tie
from loraxs_ext.layers.tiny import draw_projections, initial_vector

from ..copies import COPIERS
from .helpers import K, add, base_weight, dense_delta, make_layer

R, U = 4, 3


def make_core(seed: int = 7, u: int = U, dtype: torch.dtype = torch.float32, **options) -> TinyCore:
    v = torch.randn(u, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    core = TinyCore(v, R, seed, **options)
    core.record(torch.randn(5, R), torch.randn(R, 8), torch.randn(R, 6))
    return core


def tiny_layer(seed: int = 7, **options):
    tiny = TinyOptions(U, seed, init_bound=0.02, keep_projections=False)
    return make_layer(tiny=tiny, **options)


def test_projections_depend_on_the_seed_alone_and_have_variance_one_over_r():
    torch.manual_seed(1)
    first = draw_projections(200, 5, 3)
    torch.manual_seed(2)
    assert torch.equal(first, draw_projections(200, 5, 3))
    assert not torch.equal(first, draw_projections(200, 5, 4))
    assert first.shape == (200, 5, 5) and first.dtype == torch.float32
    assert first.var().item() == pytest.approx(1 / 5, rel=0.1)


def test_projections_are_drawn_on_the_cpu_whatever_the_default_device():
    expected = draw_projections(2, 3, 0)
    with torch.device("meta"):
        assert torch.equal(draw_projections(2, 3, 0), expected)


@pytest.mark.parametrize(
    "init, low, high", [(True, 0, 0), ("zeros", 0, 0), ("uniform", 0.019, 0.02), (False, 0.05, 1)], ids=str
)
def test_initial_vectors(init, low, high):
    options = TinyOptions(100, 0, init_bound=0.02, keep_projections=False)
    v = initial_vector(options, init, seed=0, key="q", dtype=torch.float64)
    assert v.shape == (100,) and v.dtype == torch.float64
    assert low <= v.abs().max().item() <= high
    assert torch.equal(v, initial_vector(options, init, seed=0, key="q", dtype=torch.float64))
    if init is False:
        assert v.norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "count, tying, groups",
    [
        (5, 0.0, [0, 1, 2, 3, 4]),
        (5, 1.0, [0, 0, 0, 0, 0]),
        (5, 0.6, [0, 0, 1, 1, 1]),  # the last group takes the remainder
        (5, 0.5, [0, 0, 1, 1, 1]),  # 2.5 groups are rounded to the even number
        (7, 0.5, [0, 1, 2, 3, 3, 3, 3]),
        (1, 0.9, [0]),
    ],
)
def test_groups(count, tying, groups):
    assert [group_of(index, count, tying) for index in range(count)] == groups


def test_matrix_is_the_sum():
    core = make_core(dtype=torch.float64)
    expected = sum(core.vector[k] * draw_projections(U, R, 7)[k].double() for k in range(U))
    torch.testing.assert_close(core.matrix(), expected, rtol=1e-14, atol=1e-14)


def test_tied_cores_have_one_vector_and_their_gradients_add_up():
    cores = nn.ModuleList(make_core(seed) for seed in (7, 8, 9))
    tie(list(cores), 1.0)
    assert [name for name, _ in cores.named_parameters()] == ["0.v"]
    assert {name for name in cores.state_dict() if name.endswith(".v")} == {"0.v"}
    targets = [torch.randn(R, R) for _ in cores]
    sum((core.matrix() * target).sum() for core, target in zip(cores, targets, strict=True)).backward()
    expected = sum((core.placed * target).sum((1, 2)) for core, target in zip(cores, targets, strict=True))
    torch.testing.assert_close(cores[0].v.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copier", COPIERS)
def test_copies_are_tied_among_themselves(copier):
    cores = nn.ModuleList(make_core(seed) for seed in (7, 8))
    tie(list(cores), 1.0)
    twins = copier(cores)
    before = cores[1].matrix().detach()
    twins[0].v.data.mul_(2)
    torch.testing.assert_close(twins[1].matrix(), 2 * before)
    assert torch.equal(cores[1].matrix(), before)


def test_a_vector_that_is_replaced_is_seen_by_the_group():
    """load_state_dict(assign=True) and PEFT's casts put another parameter in the place of v."""
    cores = nn.ModuleList(make_core(seed) for seed in (7, 8))
    tie(list(cores), 1.0)
    cores.load_state_dict({**cores.state_dict(), "0.v": torch.ones(U)}, assign=True)
    torch.testing.assert_close(cores[1].matrix(), draw_projections(U, R, 8).sum(0))


def test_state_dict_holds_numbers_enough_to_draw_the_rest():
    shapes = {name: tuple(tensor.shape) for name, tensor in make_core().state_dict().items()}
    assert shapes == {"v": (U,), "seed": (), "sketch": (5, R)}
    kept = make_core(keep_projections=True, basis_shape=(8, 6))
    assert set(kept.state_dict()) == {"v", "seed", "sketch", "projections", "a", "bt"}


@pytest.mark.parametrize("change", ["seed", "sketch", "projections"])
def test_loading_another_adapter_unsettles(change):
    core = make_core(keep_projections=True)
    core.load_state_dict(core.state_dict())
    assert core.settled
    state = core.state_dict()
    core.settled = True  # state_dict hands out the sketch
    core.load_state_dict({**state, change: state[change] + 1})
    assert not core.settled


def test_what_is_placed_moves_and_what_is_stored_does_not():
    core = make_core()
    stored = {name: tensor.clone() for name, tensor in core.state_dict().items()}
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    expected = signs[:, None] * core.matrix() * signs
    core.place(signs[:, None] * core.on_basis * signs)
    core.record(torch.zeros(5, R), torch.zeros(R, 8), torch.zeros(R, 6))
    torch.testing.assert_close(core.matrix(), expected)
    assert core.settled
    assert all(torch.equal(tensor, stored[name]) for name, tensor in core.state_dict().items())
    assert torch.equal(core.on_basis, draw_projections(U, R, 7))


def test_half_precision_leaves_it_alone():
    core = make_core(keep_projections=True)
    parameter, before = core.v, core.matrix().detach()
    core.v.grad = torch.full((U,), 1 / 3)
    core.to(torch.bfloat16)
    assert core.v is parameter and core.v.grad.dtype == torch.float32 and core.v.grad[0] == torch.tensor(1 / 3)
    assert {t.dtype for n, t in core.state_dict().items() if n != "seed"} == {torch.float32}
    assert torch.equal(core.matrix(), before)
    assert core.double().matrix().dtype == torch.float64
    torch.testing.assert_close(core.matrix().float(), before)


def test_autocast_does_not_round_it():
    core = make_core()
    before = core.matrix()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(core.matrix(), before)


def expected_output(layer, x, *adapters):
    """x (W + Σ ΔW)ᵀ + bias in fp64, with R as it is."""
    weight = base_weight(layer)
    for name in adapters:
        a, b = layer.get_basis(name)
        weight = weight + layer.scaling[name] * b.double() @ layer.get_R(name).double() @ a.double()
    return x.double() @ weight.mT + layer.get_base_layer().bias.double()


def test_layer():
    layer, x = tiny_layer(), torch.randn(3, K)
    torch.testing.assert_close(layer(x).double(), expected_output(layer, x, "default"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x), layer.base_layer(x), atol=1e-2)
    layer(x).square().sum().backward()
    assert layer.core("default").v.grad.any()
    layer.merge()
    torch.testing.assert_close(layer(x).double(), expected_output(layer, x, "default"), rtol=1e-5, atol=1e-5)


def test_beside_an_adapter_with_a_matrix():
    layer = tiny_layer().eval()
    add(layer, "matrix", 6)
    x = torch.randn(3, 2, K)
    with routed([layer], ["matrix", "default", "__base__"]), torch.no_grad():
        y = layer(x)
    for row, names in enumerate((["matrix"], ["default"], [])):
        torch.testing.assert_close(y[row].double(), expected_output(layer, x[row], *names), rtol=1e-5, atol=1e-5)
    layer.set_adapter(["default", "matrix"])
    both = expected_output(layer, x, "default", "matrix")
    torch.testing.assert_close(layer(x).double(), both, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.get_delta_weight("matrix").double(), dense_delta(layer, "matrix").detach())


def test_layers_that_share_a_vector_compile_in_one_graph():
    torch._dynamo.reset()
    model = nn.Sequential(tiny_layer(7), make_layer(nn.Linear(20, K), tiny=TinyOptions(U, 8, 0.02, False)))
    tie([layer.core("default") for layer in model], 1.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K)
    torch.testing.assert_close(compiled(x), model(x))
    (expected,) = torch.autograd.grad(model(x).sum(), model[0].core("default").v)
    (actual,) = torch.autograd.grad(compiled(x).sum(), model[0].core("default").v)
    torch.testing.assert_close(actual, expected)
