"""y = x Wᵀ + bias + s · (p R_slotᵀ) bᵀ for a few tokens: W is streamed once, everything else hides behind it.

A program owns a tile of N and a span of K. Up to rank 32 the rows of a ride in the same loop, so p costs no second look
at x; R and b are linear, so each span applies them to its own partial p and nothing waits. A second small launch adds
the spans in fixed order. Above rank 32 the pages of all tokens no longer fit the registers: q comes from `project`,
and the first span adds q bᵀ.

The weights are the rows of every product and the tokens its columns. So the instructions, the spans and the order of
all sums follow from (N, K, r, dtype): a row's bits do not depend on M or on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import MIN_TOKENS, add_product, load_slots, power_of_two, precision, rank_block

# Tokens up to which W is worth streaming through these kernels; beyond, tiles of 128 tokens reuse it better.
MAX_TOKENS = 128
# Up to this rank the pages of enough tokens fit the registers, 16 rows of R at a time: tiles of [tokens, 16, r], in
# fp32 of PAGE_TILE elements or 32 for each of 256 threads, in half types of twice as many.
MAX_FUSED_RANK = 32
PAGE_TILE = 8192
# Enough programs to occupy the 108 to 148 multiprocessors of the large GPUs once. (Model, not measured.)
PROGRAMS = 128
# A span shorter than this is mostly start-up and epilogue. (Model, not measured.)
MIN_SPAN = 512
# Columns of y per program of the launch that adds the spans.
SUM_BLOCK = 512


@triton.jit
def _decode_kernel(
    gx, gw, bias, ga, gb, pages, slots, gq, gy, gp, M, N, K, r, S,
    x_stride, w_stride, a_stride, b_n, b_i, page_s, page_i, page_j, span, scale,
    FUSED: tl.constexpr, SPANS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    here, wanted = tokens < M, columns < N
    x_rows = gx + tokens.to(tl.int64)[:, None] * x_stride
    w_rows = gw + columns.to(tl.int64)[:, None] * w_stride

    acc = tl.zeros((BLOCK_N, TOKENS), tl.float32)
    if FUSED:
        ranks = tl.arange(0, RANKS)
        a_rows = ga + ranks[:, None] * a_stride
        tp = tl.zeros((RANKS, TOKENS), tl.float32)
    for k0 in range(split * span, tl.minimum(split * span + span, K), BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        tx = tl.trans(tl.load(x_rows + ks[None, :], mask=here[:, None] & (ks < K)[None, :], other=0.0))
        tw = tl.load(w_rows + ks[None, :], mask=wanted[:, None] & (ks < K)[None, :], other=0.0)
        acc = tl.dot(tw, tx, acc, input_precision=PRECISION)
        if FUSED:
            ta = tl.load(a_rows + ks[None, :], mask=(ranks < r)[:, None] & (ks < K)[None, :], other=0.0)
            tp = tl.dot(ta, tx, tp, input_precision=PRECISION)

    if FUSED:
        tp = tl.trans(tp)
        if tl.program_id(1) == 0:
            at = gp + (split.to(tl.int64) * M + tokens)[:, None] * r + ranks[None, :]
            tl.store(at, tp, mask=here[:, None] & (ranks < r)[None, :])
        if slots is None:
            slot = tl.where(here, 0, -1)
        else:
            slot = load_slots(slots, tokens, here, S)
        chosen = slot >= 0
        page_rows = pages + slot.to(tl.int64)[:, None, None] * page_s + ranks[None, None, :] * page_j
        for i0 in tl.static_range(0, RANKS, 16):
            i = i0 + tl.arange(0, 16)
            inside = (i < r)[:, None] & (ranks < r)[None, :]
            page = tl.load(
                page_rows + i[None, :, None] * page_i, mask=inside[None, :, :] & chosen[:, None, None], other=0.0
            )
            # Selected, not multiplied by zero: an inf in x must not turn a base row into NaN. The sums of a base row
            # start at +0 and so are never -0: adding products with zero leaves their bits alone.
            tq = tl.where(chosen[:, None], scale * tl.sum(page.to(tl.float32) * tp[:, None, :], axis=2), 0.0)
            tb = tl.load(
                gb + columns.to(tl.int64)[:, None] * b_n + i[None, :] * b_i,
                mask=wanted[:, None] & (i < r)[None, :], other=0.0,
            )  # fmt: skip
            acc = add_product(acc, tb, tl.trans(tq), PRECISION)
    elif split == 0:
        for i0 in range(0, r, RANKS):
            i = i0 + tl.arange(0, RANKS)
            tq = tl.load(gq + tokens[:, None] * r + i[None, :], mask=here[:, None] & (i < r)[None, :], other=0.0)
            tb = tl.load(
                gb + columns.to(tl.int64)[:, None] * b_n + i[None, :] * b_i,
                mask=wanted[:, None] & (i < r)[None, :], other=0.0,
            )  # fmt: skip
            acc = add_product(acc, tb, tl.trans(tq), PRECISION)

    ty = tl.trans(acc)
    if SPANS == 1 and bias is not None:
        ty += tl.load(bias + columns, mask=wanted, other=0.0).to(tl.float32)[None, :]
    at = gy + (split.to(tl.int64) * M + tokens)[:, None] * N + columns[None, :]
    tl.store(at, ty.to(gy.dtype.element_ty), mask=here[:, None] & wanted[None, :])


@triton.jit
def _sum_kernel(
    gpartial, bias, gy, gpartial_p, gp, M, N, r,
    SPANS: tl.constexpr, SUM_P: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = columns < N
    ty = tl.load(gpartial + token * N + columns, mask=wanted, other=0.0)
    for i in tl.static_range(1, SPANS):
        ty += tl.load(gpartial + (token + i * M) * N + columns, mask=wanted, other=0.0)
    if bias is not None:
        ty += tl.load(bias + columns, mask=wanted, other=0.0).to(tl.float32)
    tl.store(gy + token * N + columns, ty.to(gy.dtype.element_ty), mask=wanted)
    if SUM_P:
        if tl.program_id(1) == 0:
            ranks = tl.arange(0, RANKS)
            tp = tl.load(gpartial_p + token * r + ranks, mask=ranks < r, other=0.0)
            for i in tl.static_range(1, SPANS):
                tp += tl.load(gpartial_p + (token + i * M) * r + ranks, mask=ranks < r, other=0.0)
            tl.store(gp + token * r + ranks, tp, mask=ranks < r)


class Tiling(NamedTuple):
    """How (N, K, dtype) is cut; of M only the number of tokens per program follows, which no order of sums shows."""

    block_n: int
    block_k: int
    spans: int
    span: int


def _tiling(N: int, K: int, dtype: torch.dtype) -> Tiling:
    half = dtype != torch.float32
    # fp32 without TF32 multiplies on the ordinary cores, whose operands live in registers: smaller tiles.
    block_n = 128 if half and N > 2048 else 64
    block_k = 64 if half else 32
    spans = 1
    while triton.cdiv(N, block_n) * spans < PROGRAMS and K >= 2 * spans * MIN_SPAN:
        spans *= 2
    return Tiling(block_n, block_k, spans, triton.cdiv(triton.cdiv(K, spans), block_k) * block_k)


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], p [M, r]) of `loraxs::linear` for x [M, K] and r ≤ MAX_FUSED_RANK, without dropout.

    Dropout would mask x for p alone, and so keep the base product from sharing it. x, weight and a have contiguous
    rows of any stride; M, N, K > 0.
    """
    M, r, spans = x.shape[0], b.shape[1], _tiling(b.shape[0], x.shape[1], x.dtype).spans
    partial_p = torch.empty(spans, M, r, dtype=torch.float32, device=x.device)
    p = partial_p[0] if spans == 1 else torch.empty(M, r, dtype=torch.float32, device=x.device)
    return _launch(x, weight, bias, a, b, pages, slots, scale, None, partial_p, p), p


def decode_rotated(x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, q: Tensor) -> Tensor:
    """y = x Wᵀ + bias + q bᵀ [M, N] for q [M, r] in fp32 of any r; the other arguments as in `decode`."""
    return _launch(x, weight, bias, None, b, None, None, 1.0, q, None, None)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor, pages: Tensor | None,
    slots: Tensor | None, scale: float, q: Tensor | None, partial_p: Tensor | None, p: Tensor | None,
) -> Tensor:  # fmt: skip
    (M, K), (N, r) = x.shape, b.shape
    block_n, block_k, spans, span = _tiling(N, K, x.dtype)
    fused = q is None
    ranks = rank_block(r) if fused else 32
    # As for the tiling: in fp32 half as much fits the registers.
    roomy = 1 if x.dtype == torch.float32 else 2
    tokens = power_of_two(M, MIN_TOKENS, roomy * (min(32, PAGE_TILE // (16 * ranks)) if fused else 32))
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    partial = y if spans == 1 else torch.empty(spans, M, N, dtype=torch.float32, device=x.device)
    page_strides = (0, 0, 0) if pages is None else pages.stride()
    _decode_kernel[(triton.cdiv(M, tokens), triton.cdiv(N, block_n), spans)](
        x, weight, bias, a, b, pages, slots, q, partial, partial_p, M, N, K, r, 0 if pages is None else pages.shape[0],
        x.stride(0), weight.stride(0), 0 if a is None else a.stride(0), *b.stride(), *page_strides, span, scale,
        FUSED=fused, SPANS=spans, TOKENS=tokens, BLOCK_N=block_n, BLOCK_K=block_k,
        RANKS=ranks, PRECISION=precision(x.dtype), num_warps=8 if fused else 4, num_stages=4,
    )  # fmt: skip
    if spans > 1:
        _sum_kernel[(M, triton.cdiv(N, SUM_BLOCK))](
            partial, bias, y, partial_p, p, M, N, r,
            SPANS=spans, SUM_P=fused, BLOCK_N=SUM_BLOCK, RANKS=rank_block(r), num_warps=4,
        )  # fmt: skip
    return y
