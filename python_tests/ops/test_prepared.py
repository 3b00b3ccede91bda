"""`prepare`: what `linear` gives for every layer, bit for bit, in one call."""

from __future__ import annotations

import gc
from importlib import import_module
from threading import Thread

import pytest
import torch
from torch import Tensor

from loraxs_ext import ops

from .problems import threads

if not ops.backends.COMPILED:
    pytest.skip("the compiled ops are not built, or LORAXS_BACKEND chooses plain torch", allow_module_level=True)

K, SLOTS = 40, 3
SHAPES = ((48, 4), (200, 4), (33, 7))  # N, r
NATIVE = [torch.float32, torch.bfloat16]


def sites_of(
    dtype: torch.dtype = torch.float32, *, bias: bool = False, pages_dtype: torch.dtype | None = None
) -> list[ops.Site]:
    torch.manual_seed(0)
    return [
        ops.Site(
            (torch.randn(n, K) / K**0.5).to(dtype),
            torch.randn(n).to(dtype) if bias else None,
            (torch.randn(r, K) / K**0.5).to(dtype),
            torch.randn(r, n).to(dtype).mT,
            torch.randn(SLOTS, r, r).to(pages_dtype or dtype),
            scale=0.5,
        )
        for n, r in SHAPES
    ]


def one_by_one(x: Tensor, sites: list[ops.Site], slots: Tensor) -> list[Tensor]:
    return [ops.linear(x, *site._replace(slots=slots)) for site in sites]


def slots_for(tokens: int) -> Tensor:
    return torch.arange(tokens, dtype=torch.int32) % (SLOTS + 1) - 1


def assert_same(sites: list[ops.Site], x: Tensor, slots: Tensor) -> None:
    prepared = ops.prepare(sites)
    if not is_fused(x.dtype):
        assert prepared is None
        return
    assert prepared is not None
    for y, alone in zip(prepared(x, slots), one_by_one(x, sites, slots), strict=True):
        assert y.shape == alone.shape and torch.equal(y, alone)


def is_fused(dtype: torch.dtype) -> bool:
    """Whether this CPU has a fused product of that dtype."""
    level = import_module("loraxs_ext._C").cpu_isa()
    return level == "amx_bf16" or (dtype == torch.float32 and level.startswith("avx512"))


needs_fused = pytest.mark.skipif(not is_fused(torch.float32), reason="no fused product in fp32 on this CPU")


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 12, 13, 32, 33, 150])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_bit_for_bit_what_linear_gives(dtype: torch.dtype, tokens: int, bias: bool) -> None:
    assert_same(sites_of(dtype, bias=bias), torch.randn(tokens, 1, K).to(dtype), slots_for(tokens))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(count: int) -> None:
    wide = ops.Site(torch.randn(3001, K), None, torch.randn(4, K), torch.randn(4, 3001).mT, torch.randn(SLOTS, 4, 4))
    sites = [site._replace(scale=1.0) for site in sites_of()]
    with threads(count):
        for tokens in (1, 7, 20, 100):
            assert_same([sites[0], wide, sites[1]], torch.randn(tokens, K), slots_for(tokens))


def test_wide_pages_and_pages_of_a_slab() -> None:
    sites = sites_of(torch.bfloat16, pages_dtype=torch.float32)
    slab = torch.randn(SLOTS, 100)
    views = [slab[:, i * 16 : i * 16 + r * r].view(SLOTS, r, r) for i, (_, r) in enumerate(SHAPES)]
    sites = [site._replace(pages=view) for site, view in zip(sites, views, strict=True)]
    assert_same(sites, torch.randn(4, K).bfloat16(), slots_for(4))


@needs_fused
def test_none_where_linear_does_not_fuse() -> None:
    prepared = ops.prepare(sites_of())
    assert prepared is not None
    assert prepared(torch.randn(K, 6).mT, slots_for(6)) == []
    assert prepared(torch.randn(2, 1, 3, K), slots_for(6)) == []


@needs_fused
def test_the_memory_counts_and_stays() -> None:
    sites, x, slots = sites_of(), torch.randn(2, K), slots_for(2)
    prepared = ops.prepare(sites)
    assert prepared is not None
    sites[0].weight.mul_(2)
    assert torch.equal(prepared(x, slots)[0], one_by_one(x, sites, slots)[0])
    expected = prepared(x, slots)
    for site in sites:
        for tensor in site[:5]:
            if tensor is not None:
                tensor.data = torch.full_like(tensor, torch.nan)
    del sites, site, tensor
    gc.collect()
    assert all(torch.equal(y, before) for y, before in zip(prepared(x, slots), expected, strict=True))


def test_what_cannot_be_prepared() -> None:
    sites = sites_of()
    assert ops.prepare(sites_of(torch.float64)) is None
    assert ops.prepare(sites_of(torch.float16)) is None
    assert ops.prepare([sites[0], sites[1]._replace(scale=2.0)]) is None
    assert ops.prepare([sites[0], sites[1]._replace(bias=torch.zeros(200))]) is None
    assert ops.prepare([sites[0], sites[1]._replace(pages=torch.zeros(SLOTS + 1, 4, 4))]) is None
    assert ops.prepare([sites[0]._replace(weight=torch.randn(K, 48).mT)]) is None
    assert ops.prepare([sites[0]._replace(b=torch.randn(48, 4))]) is None
    assert ops.prepare([sites[0]._replace(pages=torch.randn(SLOTS, 4, 4).mT)]) is None


@needs_fused
def test_what_does_not_fit_is_named() -> None:
    sites, x = sites_of(), torch.randn(2, K)
    prepared = ops.prepare(sites)
    assert prepared is not None
    with pytest.raises(ValueError, match=r"slots: expected values in \[-1, 3\)"):
        prepared(x, torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="slots: expected shape"):
        prepared(x, slots_for(3))
    with pytest.raises(ValueError, match="slots: expected dtype"):
        prepared(x, slots_for(2).long())
    with pytest.raises(ValueError, match="x: expected"):
        prepared(torch.randn(2, K + 1), slots_for(2))
    with pytest.raises(ValueError, match="x: expected the dtype of the weights"):
        prepared(x.double(), slots_for(2))
    with pytest.raises(ValueError, match="a: expected shape"):
        ops.prepare([sites[0]._replace(a=torch.randn(4, K + 1))])
    with pytest.raises(ValueError, match="id: expected one of _prepare, got -1"):
        torch.ops.loraxs._run_prepared(x, slots_for(2), -1)


@needs_fused
def test_forgotten_with_its_object() -> None:
    prepared = ops.prepare(sites_of())
    assert prepared is not None
    identity = prepared._id
    torch.ops.loraxs._run_prepared(torch.randn(2, K), slots_for(2), identity)
    del prepared
    gc.collect()
    with pytest.raises(ValueError, match="id: expected one of _prepare"):
        torch.ops.loraxs._run_prepared(torch.randn(2, K), slots_for(2), identity)


def test_many_threads_prepare_call_and_forget() -> None:
    sites, x, slots = sites_of(), torch.randn(3, K), slots_for(3)
    expected, wrong = one_by_one(x, sites, slots), []

    def work() -> None:
        for _ in range(50):
            prepared = ops.prepare(sites)
            got = prepared(x, slots) if prepared is not None else []
            if got and not all(torch.equal(y, e) for y, e in zip(got, expected, strict=True)):
                wrong.append(got)

    workers = [Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
