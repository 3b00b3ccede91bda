"""Siblings that share one projection of x: the same results, and never the projection of another x."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loraxs_ext import ops
from loraxs_ext.layers import LoraXSLinear, routed, share_projections
from loraxs_ext.layers import linear as linear_module
from loraxs_ext.layers import stacked as stacked_module

from ..copies import COPIERS
from .helpers import K, add, expected_output, make_layer

TOKENS = 10


@pytest.fixture(autouse=True)
def shared_on_the_cpu(monkeypatch):
    monkeypatch.setattr(linear_module, "SHARE_ON_CPU", True)
    monkeypatch.setattr(stacked_module, "ALONE_TOKENS", 1)


@pytest.fixture
def projections(monkeypatch) -> list[int]:
    """The rows of the stacked basis of every projection so far."""
    seen: list[int] = []
    project = ops.project

    def count(x: Tensor, a: Tensor) -> Tensor:
        seen.append(a.shape[0])
        return project(x, a)

    monkeypatch.setattr(ops, "project", count)
    return seen


class Attention(nn.Module):
    """Three layers read x, a fourth of the same width reads what they make."""

    def __init__(self, dtype: torch.dtype = torch.float32, ranks: tuple[int, ...] = (4, 3, 4, 4), **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, r in zip(("q", "k", "v", "o"), ranks, strict=True):
            setattr(self, name, make_layer(nn.Linear(K, K, dtype=dtype), r=r, **options))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(x) * self.v(x))

    def alone(self, x: Tensor) -> Tensor:
        q, k, v = (expected_output(layer, x, "default") for layer in (self.q, self.k, self.v))
        return expected_output(self.o, q + k * v, "default")


def shared(model: nn.Module) -> nn.Module:
    share_projections(model)
    return model


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_one_projection_for_three_layers_and_the_fourth_leaves(projections):
    model = shared(Attention())
    x = torch.randn(TOKENS, K)
    close(model(x), model.alone(x))
    assert projections == [16]
    assert model.o.siblings is None and model.q.siblings is model.k.siblings is model.v.siblings is not None
    x = torch.randn(2, TOKENS, K)
    close(model(x), model.alone(x))
    assert projections == [16, 12]


def test_shares_are_those_of_one_projection_exactly():
    model = shared(Attention(torch.float64))
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    q = model.q
    together = [layer(x) for layer in (model.q, model.k, model.v)]
    a, b = q.get_basis("default")
    weight, bias = q.base_layer.weight, q.base_layer.bias
    pages = q.get_R("default")[None]
    stack = torch.cat([layer.loraxs_A[:4] for layer in (model.q, model.k, model.v, model.o)])
    p = ops.project(x, stack)[:, :4]
    assert torch.equal(together[0], ops.linear_projected(x, weight, bias, p, a, b, pages, None, q.scaling["default"]))


def test_training_gives_the_gradients_of_layers_alone():
    alone, together = Attention(torch.float64), shared(Attention(torch.float64))
    x = torch.randn(TOKENS, K, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for _ in range(2):  # the second time without the fourth layer
        results = []
        for model, leaf in zip((alone, together), leaves, strict=True):
            cores = [layer.loraxs_R["default"].weight for layer in (model.q, model.k, model.v, model.o)]
            results.append(torch.autograd.grad(model(leaf).square().sum(), [leaf, *cores]))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_projects_alone(projections):
    model = shared(Attention(dropout=0.5))
    model.train()
    model(torch.randn(TOKENS, K))
    assert projections == []
    model.eval()
    x = torch.randn(TOKENS, K)
    close(model(x), model.alone(x))
    assert projections == [16]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = shared(Attention())
    x = torch.randn(TOKENS, K, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    again = x.detach().clone().requires_grad_()
    Attention()(again).sum().backward()
    close(x.grad, again.grad)


def test_x_changed_in_place_is_projected_again(projections):
    model = shared(Attention())
    x = torch.randn(TOKENS, K)
    model.q(x)
    x.mul_(2)
    close(model.k(x), expected_output(model.k, x, "default"))
    assert len(projections) == 2


def test_inference_tensors_have_no_version_and_are_projected_alone(projections):
    model = shared(Attention())
    with torch.inference_mode():
        x = torch.randn(TOKENS, K)
        close(model(x), model.alone(x))
    assert projections == []


def test_an_x_of_the_same_memory_is_another_x():
    model = shared(Attention())
    for _ in range(20):
        x = torch.randn(TOKENS, K)
        close(model.q(x), expected_output(model.q, x, "default"))
        del x
        y = torch.randn(TOKENS, K)
        close(model.k(y), expected_output(model.k, y, "default"))


def test_x_does_not_outlive_its_forward():
    model = shared(Attention())
    x = torch.randn(TOKENS, K)
    watch = weakref.ref(x)
    with torch.no_grad():
        model.q(x)
    del x
    assert watch() is None


def test_p_does_not_outlive_its_forward(projections):
    model = shared(Attention())
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(TOKENS, K))
    assert model.q.siblings._turn is None


def test_a_group_does_not_keep_the_model_alive():
    model = shared(Attention())
    model(torch.randn(TOKENS, K))
    gc.collect()
    gc.disable()
    try:
        watch = weakref.ref(model.q)
        del model
        assert watch() is None
    finally:
        gc.enable()


def test_layers_that_read_another_x_form_a_group_of_their_own(projections):
    model = shared(Attention())
    hidden, encoded = torch.randn(TOKENS, K), torch.randn(TOKENS, K)
    for _ in range(3):  # cross attention
        model.q(hidden)
        close(model.k(encoded), expected_output(model.k, encoded, "default"))
        close(model.v(encoded), expected_output(model.v, encoded, "default"))
        model.o(torch.randn(TOKENS, K))
    assert model.q.siblings._members == [weakref.ref(model.q)]
    assert model.k.siblings is model.v.siblings and model.o.siblings is None
    assert projections[-1] == 2 * 3


def test_adapters_of_several_ranks_and_mixed_batches():
    model = Attention(ranks=(4, 4, 4, 4))
    for layer in (model.q, model.k, model.v, model.o):
        add(layer, "small", 2)
    shared(model)
    x = torch.randn(3, TOKENS, K)
    layers = [model.q, model.k, model.v, model.o]
    with torch.no_grad(), routed(layers, ["small", "default", "__base__"]):
        got = [layer(x) for layer in layers]
    for layer, y in zip(layers, got, strict=True):
        close(y[0], expected_output(layer, x[0], "small"))
        close(y[1], expected_output(layer, x[1], "default"))
        assert torch.equal(y[2], layer.base_layer(x)[2])
    for layer in layers:
        layer.set_adapter("small")
    close(model.k(x), expected_output(model.k, x, "small"))
    close(model.v(x), expected_output(model.v, x, "small"))


def test_a_sibling_of_a_larger_rank_projects_alone(projections):
    model = shared(Attention(ranks=(2, 4, 2, 2)))
    for _ in range(2):
        x = torch.randn(TOKENS, K)
        close(model(x), model.alone(x))
    assert projections == [8, 6]


def test_a_new_basis_is_used_at_once():
    model = shared(Attention())
    x = torch.randn(TOKENS, K)
    model(x)
    model.q(x)
    model.k.set_basis(model.k.loraxs_A * 2, model.k.loraxs_Bt)
    close(model.k(x), expected_output(model.k, x, "default"))
    y = torch.randn(TOKENS, K)
    close(model.k(y), expected_output(model.k, y, "default"))


def test_autocast_within_one_x_is_noticed():
    model = shared(Attention())
    x = torch.randn(TOKENS, K)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.q(x)
    assert rounded.dtype == torch.bfloat16
    close(model.k(x), expected_output(model.k, x, "default"))


def test_two_threads_do_not_take_each_others_projection():
    model = shared(Attention())
    model(torch.randn(TOKENS, K))
    wrong: list[Tensor] = []

    def work(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(TOKENS, K, generator=g)
            with torch.no_grad():
                y = model(x)
                if not torch.allclose(y.double(), model.alone(x), rtol=1e-4, atol=1e-4):
                    wrong.append(x)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("copier", COPIERS)
def test_copies_start_alone(copier):
    model = shared(Attention())
    x = torch.randn(TOKENS, K)
    y = model(x)
    twin = copier(model)
    assert twin.q.siblings is None
    close(twin(x), y)


def test_compiled_in_one_graph_without_sharing(projections):
    model = shared(Attention())
    x = torch.randn(TOKENS, K)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(x), model.alone(x))
    assert projections == []


def test_few_tokens_are_projected_alone(projections, monkeypatch):
    monkeypatch.setattr(stacked_module, "ALONE_TOKENS", TOKENS)
    model = shared(Attention())
    model(torch.randn(TOKENS, K))
    assert projections == []
    model(torch.randn(TOKENS + 1, K))
    assert projections == [16]


def test_the_cpu_is_left_alone(projections, monkeypatch):
    monkeypatch.setattr(linear_module, "SHARE_ON_CPU", stacked_module.SHARE_ON_CPU)
    model = shared(Attention())
    model(torch.randn(TOKENS, K))
    assert projections == []


def test_only_siblings_of_equal_width_are_grouped():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = make_layer(), make_layer()
            self.down = make_layer(nn.Linear(K + 4, K))
            self.plain = nn.Linear(K, K)
            self.inner = nn.ModuleDict({"only": make_layer()})

    model = shared(Mixed())
    assert model.up.siblings is model.gate.siblings is not None
    assert model.down.siblings is None and model.inner["only"].siblings is None
    assert all(isinstance(m, LoraXSLinear) for m in (model.up, model.gate))
