"""Sibling layers that share a call: the numbers of every layer alone, whoever is called with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from loraxs_ext import LoraXSConfig, ops
from loraxs_ext.layers import LoraXSLinear, Route, Rows, following, fuse, share_projections, together

from ..ops.test_prepared import needs_fused

K, ROWS = 24, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, K), nn.Linear(K, 16), nn.Linear(K, 16)
        self.o = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * k.sum(-1, keepdim=True) + v.sum(-1, keepdim=True))


class World:
    """An attention whose rows are served by three slots, alone or together."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = LoraXSConfig(r=3, target_modules=["q", "k", "v", "o"], init_weights=False)
        self.model = get_peft_model(Attention(), config).eval().base_model.model
        share_projections(self.model)
        self.layers = [layer for layer in self.model.children() if isinstance(layer, LoraXSLinear)]
        self.rows = Rows(torch.tensor([1, -1, 0], dtype=torch.int32), exact=True)
        self.routes = {layer: Route(self.rows, torch.randn(2, 3, 3), "default") for layer in self.layers}

    def alone(self, call: Callable[[], Tensor]) -> Tensor:
        kept = {layer: layer.fused for layer in self.layers}
        for layer in self.layers:
            layer.fused = None
        try:
            return call()
        finally:
            for layer, fused in kept.items():
                layer.fused = fused


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def shared_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each shared call was for."""
    calls: list[int] = []
    plain = ops.prepare

    def prepare(sites: Sequence[ops.Site]) -> Callable[[Tensor, Tensor], list[Tensor]] | None:
        prepared = plain(sites)
        if prepared is None:
            return None

        def counted(x: Tensor, slots: Tensor) -> list[Tensor]:
            if len(sites) > 1:
                calls.append(len(sites))
            return prepared(x, slots)

        return counted

    monkeypatch.setattr(ops, "prepare", prepare)
    return calls


@needs_fused
@torch.no_grad()
def test_who_reads_what_is_found_out_once(world: World, shared_calls: list[int]) -> None:
    for _ in range(2):
        fuse(world.routes)
        with following(world.routes):
            for _ in range(3):
                x = torch.randn(ROWS, 1, K)
                assert torch.equal(world.model(x), world.alone(lambda x=x: world.model(x)))
    # The first is wrong about the output projection; from then on it is known, in the next batch too.
    assert shared_calls == [4, 3, 3, 3, 3, 3]
    assert world.model.o.siblings is None and world.model.q.siblings is world.model.v.siblings is not None


@torch.no_grad()
def test_many_tokens_are_called_alone(world: World, shared_calls: list[int]) -> None:
    fuse(world.routes)
    with following(world.routes):
        x = torch.randn(ROWS, together.FEW_TOKENS, K)
        assert torch.equal(world.model(x), world.alone(lambda: world.model(x)))
    assert shared_calls == []


@torch.no_grad()
def test_an_input_that_changed_is_another(world: World) -> None:
    fuse(world.routes)
    q, k, _, _ = world.layers
    with following(world.routes):
        x = torch.randn(ROWS, 1, K)
        q(x)
        x.mul_(2)
        assert torch.equal(k(x), world.alone(lambda: k(x)))
        twin = x.clone()
        q(x)
        assert torch.equal(k(twin), world.alone(lambda: k(twin)))


@torch.no_grad()
def test_every_call_has_a_result_of_its_own(world: World) -> None:
    fuse(world.routes)
    q, k, _, _ = world.layers
    with following(world.routes):
        x = torch.randn(ROWS, 1, K)
        q(x)
        first, second = k(x), k(x)
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@torch.no_grad()
def test_other_slots_count_for_the_next_input(world: World) -> None:
    fuse(world.routes)
    with following(world.routes):
        world.model(torch.randn(ROWS, 1, K))
        world.rows.slots = torch.tensor([-1, 1, 1], dtype=torch.int32)
        x = torch.randn(ROWS, 1, K)
        assert torch.equal(world.model(x), world.alone(lambda: world.model(x)))
        with pytest.raises(ValueError, match="got 3 for an input of shape"):
            world.model(torch.randn(4, 1, K))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad], ids=["inference", "grad"])
def test_modes_in_which_nothing_is_shared(world: World, shared_calls: list[int], mode: Callable) -> None:
    fuse(world.routes)
    with following(world.routes), mode():
        x = torch.randn(ROWS, 1, K)
        assert torch.equal(world.model(x), world.alone(lambda: world.model(x)))
    assert shared_calls == []


@torch.no_grad()
def test_autocast(world: World, shared_calls: list[int]) -> None:
    fuse(world.routes)
    with following(world.routes), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(ROWS, 1, K)
        y = world.model(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, world.alone(lambda: world.model(x)))
    assert shared_calls == []


@torch.no_grad()
def test_a_gradient_of_x_is_not_lost(world: World) -> None:
    fuse(world.routes)
    x = torch.randn(ROWS, 1, K, requires_grad=True)
    with following(world.routes), torch.enable_grad():
        (got,) = torch.autograd.grad(world.model(x).sum(), x)
        (expected,) = torch.autograd.grad(world.alone(lambda: world.model(x)).sum(), x)
    torch.testing.assert_close(got, expected)


def test_merging_inside_a_batch_is_refused(world: World) -> None:
    with following(world.routes), pytest.raises(RuntimeError, match="outside of a mixed batch"):
        world.model.q.merge()
    assert not world.model.q.merged
