"""p = drop(x) aᵀ and q = s · R_slot p: what the low-rank path needs of x, in two small launches.

x is streamed once by tiles of tokens and spans of K, each leaving a partial p; the second launch adds the spans in
fixed order and applies every token's own R, gathered by its slot. Nothing is sorted, and both grids depend on shapes
alone. All sums of a row run in an order given by (K, r), so its p and q do not depend on the rest of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import MIN_TOKENS, as_rows, dropout, keep_tile, load_slots, power_of_two, precision, rank_block

# K is cut so that a few tokens still occupy several multiprocessors: about 1024 columns a span, at most 8 spans, as
# every span writes and reads a partial p. (Model, not measured.)
SPAN = 1024
MAX_SPANS = 8
# Columns of x per step: 128 bytes of every row, one line of L2.
BLOCK_BYTES = 128
# Elements of the page tile [tokens, i, j] that a program of 128 threads keeps in registers: 32 each.
PAGE_TILE = 4096


@triton.jit
def _project_kernel(
    gx, ga, gp, rng, M, K, r, x_stride, a_stride, span, threshold, keep_scale,
    DROP: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    here = tokens < M
    x_rows = gx + tokens.to(tl.int64)[:, None] * x_stride
    a_rows = ga + ranks.to(tl.int64)[:, None] * a_stride

    # Ranks are the rows of the product, so the instruction, and with it the order of sums, does not depend on M.
    acc = tl.zeros((RANKS, TOKENS), tl.float32)
    for k0 in range(split * span, tl.minimum(split * span + span, K), BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        tx = tl.load(x_rows + ks[None, :], mask=here[:, None] & (ks < K)[None, :], other=0.0)
        ta = tl.load(a_rows + ks[None, :], mask=(ranks < r)[:, None] & (ks < K)[None, :], other=0.0)
        if DROP:
            tx = tl.where(keep_tile(tokens, k0, rng, threshold, BLOCK_K), tx, 0.0)
        acc = tl.dot(ta, tl.trans(tx), acc, input_precision=PRECISION)

    out = gp + (split.to(tl.int64) * M + tokens)[:, None] * r + ranks[None, :]
    tl.store(out, tl.trans(acc) * keep_scale, mask=here[:, None] & (ranks < r)[None, :])


@triton.jit
def _sum_spans(gp, tokens, ranks, M, r, p_stride, SPANS: tl.constexpr):
    """p[tokens, ranks] = Σ over spans, in order."""
    mask = (tokens < M)[:, None] & (ranks < r)[None, :]
    token64 = tokens.to(tl.int64)[:, None]
    total = tl.load(gp + token64 * p_stride + ranks[None, :], mask=mask, other=0.0)
    for i in tl.static_range(1, SPANS):
        total += tl.load(gp + (token64 + i * M) * p_stride + ranks[None, :], mask=mask, other=0.0)
    return total


@triton.jit
def _rotate_kernel(
    gpartial, gp, pages, slots, gq, M, r, S, p_stride, page_s, page_i, page_j, scale,
    SPANS: tl.constexpr, ROTATE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    mask = (tokens < M)[:, None] & (rows < r)[None, :]
    if SPANS > 1:
        tp = _sum_spans(gpartial, tokens, rows, M, r, p_stride, SPANS)
        tl.store(gp + tokens.to(tl.int64)[:, None] * r + rows[None, :], tp, mask=mask)
    if ROTATE:
        tp = _sum_spans(gpartial, tokens, ranks, M, r, p_stride, SPANS)
        at = pages + rows[:, None] * page_i + ranks[None, :] * page_j
        inside = (rows < r)[:, None] & (ranks < r)[None, :]
        if slots is None:
            page = tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :, :]
            tq = tl.sum(page * tp[:, None, :], axis=2)
        else:
            slot = load_slots(slots, tokens, tokens < M, S)
            chosen = slot >= 0
            at = at[None, :, :] + slot.to(tl.int64)[:, None, None] * page_s
            page = tl.load(at, mask=inside[None, :, :] & chosen[:, None, None], other=0.0).to(tl.float32)
            # Selected, not multiplied by zero: an inf in x must not turn a base row into NaN.
            tq = tl.where(chosen[:, None], tl.sum(page * tp[:, None, :], axis=2), 0.0)
        out = gq + tokens.to(tl.int64)[:, None] * r + rows[None, :]
        tl.store(out, scale * tq, mask=mask)


def project(x: Tensor, a: Tensor, p_drop: float = 0.0, rng: Tensor | None = None) -> Tensor:
    """p = drop(x) aᵀ.

    Args:
        x: [..., K] in fp32, bf16 or fp16; rows of any stride.
        a: [r, K], dtype of x, of any height: the basis of one site, or of several that share x, stacked.
        p_drop, rng: dropout of x as in `loraxs::linear`.

    Returns:
        p [M, r] in fp32.
    """
    partial = _project(x, a, p_drop, rng)
    return partial[0] if partial.shape[0] == 1 else _finish(partial, None, None, 1.0, None)


def rotate(p: Tensor, pages: Tensor, slots: Tensor | None, scale: float) -> Tensor:
    """q_m = scale · R_slot(m) p_m; zero where the slot is −1.

    Args:
        p: [M, r] in fp32, rows of any stride (columns of a stacked projection).
        pages: [S, r, r], fp32, bf16 or fp16, of any strides.
        slots: int32 [M] with values in [−1, S), or None for slot 0. A value outside counts as −1.
        scale: s.

    Returns:
        q [M, r] in fp32.
    """
    q = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    _finish(as_rows(p)[None], pages, slots, scale, q)
    return q


def project_and_rotate(
    x: Tensor,
    a: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(p, q) of `project` and `rotate` in two launches; arguments as there."""
    partial = _project(x, a, p_drop, rng)
    q = torch.empty(partial.shape[1:], dtype=torch.float32, device=x.device)
    return _finish(partial, pages, slots, scale, q), q


def _project(x: Tensor, a: Tensor, p_drop: float, rng: Tensor | None) -> Tensor:
    """Partial p [spans, M, r]."""
    x, a = as_rows(x), as_rows(a)
    M, K, r = x.shape[0], x.shape[1], a.shape[0]
    spans = power_of_two(K // SPAN, 1, MAX_SPANS)
    block_k = BLOCK_BYTES // x.element_size()
    span = triton.cdiv(triton.cdiv(K, spans), block_k) * block_k
    partial = torch.empty(spans, M, r, dtype=torch.float32, device=x.device)
    if partial.numel() == 0 or K == 0:
        return partial.zero_()
    threshold, keep_scale = dropout(p_drop)
    # fp32 without TF32 multiplies on the ordinary cores, whose operands live in registers: smaller tiles.
    ranks = power_of_two(r, 16, 128 if x.dtype != torch.float32 else 32)
    # a is read once a token tile: tiles as tall as the rank make that no more than the reading of x.
    tokens = power_of_two(M, MIN_TOKENS, 64 if ranks > 32 else 32)
    _project_kernel[(triton.cdiv(M, tokens), spans, triton.cdiv(r, ranks))](
        x, a, partial, rng, M, K, r, x.stride(0), a.stride(0), span, threshold, keep_scale,
        DROP=p_drop > 0.0, TOKENS=tokens, RANKS=ranks, BLOCK_K=block_k, PRECISION=precision(x.dtype),
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return partial


def _finish(partial: Tensor, pages: Tensor | None, slots: Tensor | None, scale: float, q: Tensor | None) -> Tensor:
    """Sum the spans of p, write q where it is wanted; returns p [M, r]."""
    spans, M, r = partial.shape
    p = partial[0] if spans == 1 else torch.empty(M, r, dtype=torch.float32, device=partial.device)
    if M == 0:
        return p
    ranks = rank_block(r)
    rows = 16
    tokens = max(1, PAGE_TILE // (rows * ranks))
    strides = (0, 0, 0) if pages is None else pages.stride()
    _rotate_kernel[(triton.cdiv(M, tokens), triton.cdiv(r, rows))](
        partial, p, pages, slots, q, M, r, 0 if pages is None else pages.shape[0],
        partial.stride(1), *strides, scale,
        SPANS=spans, ROTATE=q is not None, TOKENS=tokens, ROWS=rows, RANKS=ranks, num_warps=4,
    )  # fmt: skip
    return p
