"""`linear_siblings`: what `linear` gives for every layer, bit for bit, in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraxs_ext import ops
from loraxs_ext.ops import reference

K = 40
SHAPES = ((48, 4), (200, 4), (33, 7))  # N, r


def layers_of(dtype: torch.dtype, *, bias: bool = False, pages_dtype: torch.dtype | None = None) -> ops.Siblings:
    torch.manual_seed(0)
    rows = [
        (
            torch.randn(n, K) / K**0.5,
            torch.randn(n),
            torch.randn(r, K) / K**0.5,
            torch.randn(r, n).mT,
            torch.randn(3, r, r),
        )
        for n, r in SHAPES
    ]
    weight, biases, a, b, pages = (list(column) for column in zip(*rows, strict=True))
    cast = [[t.to(dtype) for t in column] for column in (weight, biases if bias else [], a, b)]
    return ops.Siblings(*cast, [p.to(pages_dtype or dtype) for p in pages], 0.5)


def one_by_one(x: Tensor, layers: ops.Siblings, slots: Tensor | None) -> list[Tensor]:
    biases = layers.bias or [None] * len(layers.weight)
    sites = zip(layers.weight, biases, layers.a, layers.b, layers.pages, strict=True)
    return [ops.linear(x, *site, slots, layers.scale) for site in sites]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 12, 13, 32, 33, 150])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_bit_for_bit_what_linear_gives(dtype: torch.dtype, tokens: int, bias: bool) -> None:
    x, layers = torch.randn(tokens, 1, K).to(dtype), layers_of(dtype, bias=bias)
    for slots in (None, torch.arange(tokens, dtype=torch.int32) % 4 - 1):
        got = ops.linear_siblings(x, layers, slots)
        for y, alone in zip(got, one_by_one(x, layers, slots), strict=True):
            assert y.shape == alone.shape and torch.equal(y, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_means_the_same(dtype: torch.dtype) -> None:
    x, layers = torch.randn(5, K).to(dtype), layers_of(dtype)
    slots = torch.tensor([0, -1, 2, 1, 1], dtype=torch.int32)
    expected = reference.linear_siblings(x, *layers[:5], slots, layers.scale)
    for y, plain in zip(ops.linear_siblings(x, layers, slots), expected, strict=True):
        torch.testing.assert_close(y, plain, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0.016)


def test_wide_pages_and_pages_of_a_slab() -> None:
    x, layers = torch.randn(4, K).bfloat16(), layers_of(torch.bfloat16, pages_dtype=torch.float32)
    slots = torch.tensor([2, 0, -1, 1], dtype=torch.int32)
    slab = torch.zeros(3, 100)
    views = [slab[:, i * 16 : i * 16 + r * r].view(3, r, r) for i, (_, r) in enumerate(SHAPES)]
    for view, pages in zip(views, layers.pages, strict=True):
        pages.copy_(view.normal_())
    for y, alone in zip(
        ops.linear_siblings(x, layers._replace(pages=views), slots), one_by_one(x, layers, slots), strict=True
    ):
        assert torch.equal(y, alone)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    layers = layers_of(torch.float32)
    big = [torch.randn(3000, K), *layers.weight[1:]], [*[torch.randn(4, 3000).mT], *layers.b[1:]]
    layers = layers._replace(weight=big[0], b=big[1])
    try:
        torch.set_num_threads(threads)
        for tokens in (1, 7, 20):
            x = torch.randn(tokens, K)
            for y, alone in zip(ops.linear_siblings(x, layers), one_by_one(x, layers, None), strict=True):
                assert torch.equal(y, alone)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_named() -> None:
    x, layers = torch.randn(2, K), layers_of(torch.float32)
    with pytest.raises(ValueError, match="linear_siblings: pages: expected 3 tensors, as many as weights, got 2"):
        ops.linear_siblings(x, layers._replace(pages=layers.pages[:2]))
    with pytest.raises(ValueError, match="linear_siblings: bias: expected 3 tensors"):
        ops.linear_siblings(x, layers._replace(bias=[torch.zeros(48)]))
    with pytest.raises(ValueError, match="linear_siblings: weight: expected at least one tensor, got none"):
        ops.linear_siblings(x, ops.Siblings([], [], [], [], []))
    with pytest.raises(ValueError, match="linear_siblings: slots: expected values in"):
        ops.linear_siblings(x, layers, torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="linear_siblings: a: expected shape"):
        ops.linear_siblings(x, layers._replace(a=layers.a[::-1]))


def test_fake_kernels() -> None:
    x, layers = torch.randn(2, K), layers_of(torch.float32, bias=True)
    arguments = (x, *layers[:5], torch.tensor([0, -1], dtype=torch.int32), layers.scale)
    torch.library.opcheck(torch.ops.loraxs.linear_siblings.default, arguments)
