"""loraxs::linear_backward: one pass over dy for dq and dp, one sum per slot for dpages, one GEMM for dx.

With its factors exchanged, the projection of the forward is that of the backward: dq = dy b and dp = s · dq R, where b
and Rᵀ stand for aᵀ and R. dx = dy W then begins its sums with the masked low-rank part instead of with zero.

Order of sums. A slot's rows are cut into chunks of fixed length, counted from its own first row, and the chunks are
added in order: dpages of a slot are the same bits whatever other rows there are, and wherever they lie. A row of dx is
summed in an order given by (N, r), so it does not depend on the rest of the batch either, with `fuse_base`; without it,
that is up to torch's matmul.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .project import project, project_and_rotate
from .tiles import add_product, as_rows, dropout, keep_tile, power_of_two, precision

# Row tiles of dx that run one after another on the same columns of W, so that these are still in L2. (Model.)
GROUP = 8


@triton.jit
def chunk_bounds(chunk, gstarts, gchunks, S, CHUNK: tl.constexpr):
    """[begin, end) in the order of `Segments`: from the first row of a chunk to the last of its slot."""
    # The last slot whose first chunk is not after this one.
    slot, after = 0, S
    while after - slot > 1:
        middle = (slot + after) // 2
        not_after = tl.load(gchunks + middle) <= chunk
        slot, after = tl.where(not_after, middle, slot), tl.where(not_after, after, middle)
    begin = tl.load(gstarts + slot) + (chunk - tl.load(gchunks + slot)) * CHUNK
    return begin, tl.load(gstarts + slot + 1)


@triton.jit
def _chunk_kernel(
    gdq, gp, gorder, gstarts, gchunks, gpartial, M, S, r, p_stride,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[chunk] = Σ dq_mᵀ p_m over the rows of one chunk; a tile [BLOCK_R, BLOCK_R] of it per program."""
    chunk = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if gorder is None:
        begin, end = chunk * CHUNK, M
    else:
        # The grid is as long as any slots could need; nothing is left to do beyond the last chunk.
        if chunk >= tl.load(gchunks + S):
            return
        begin, end = chunk_bounds(chunk, gstarts, gchunks, S, CHUNK)

    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for step in range(0, CHUNK, BLOCK_M):
        at = begin + step + tl.arange(0, BLOCK_M)
        here = at < end
        row = at.to(tl.int64) if gorder is None else tl.load(gorder + at, mask=here, other=0)
        tdq = tl.load(gdq + row[:, None] * r + i, mask=here[:, None] & (i < r), other=0.0)
        tp = tl.load(gp + row[:, None] * p_stride + j, mask=here[:, None] & (j < r), other=0.0)
        acc = tl.dot(tl.trans(tdq), tp, acc, input_precision="ieee")
    out = gpartial + chunk.to(tl.int64) * r * r + i[:, None] * r + j
    tl.store(out, acc, mask=(i < r)[:, None] & (j < r))


@triton.jit
def total_kernel(
    gpartial, gchunks, gdpages, n_chunks, n_elements, scale, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dpages[slot] = s · Σ partial over the chunks of the slot; zero for a slot without rows."""
    slot = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < n_elements
    if gchunks is None:
        begin, end = 0, tl.where(slot == 0, n_chunks, 0)
    else:
        begin, end = tl.load(gchunks + slot), tl.load(gchunks + slot + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, GROUP):
        chunk = first + tl.arange(0, GROUP)
        at = gpartial + chunk[:, None].to(tl.int64) * n_elements + element
        total += tl.sum(tl.load(at, mask=(chunk < end)[:, None] & inside, other=0.0), 0)
    tl.store(gdpages + slot * n_elements + element, (scale * total).to(gdpages.dtype.element_ty), mask=inside)


# Where dy W comes from: nowhere (there is no weight) · summed here · already in dx, from torch.
ABSENT, FUSED, STORED = (tl.constexpr(base) for base in range(3))


@triton.jit
def _dx_kernel(
    gdy, gweight, gdp, ga, gslots, gdx, grng, M, N, K, r,
    dy_stride, weight_stride_n, weight_stride_k, a_stride, threshold, keep_scale,
    BASE: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_K] of dx = dy W + mask/(1 − p_drop) · (dp a)."""
    n_m, n_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    group, within = tl.program_id(0) // (GROUP * n_k), tl.program_id(0) % (GROUP * n_k)
    height = tl.minimum(n_m - group * GROUP, GROUP)
    m = (group * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = within // height * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    in_m, in_k = m < M, k < K
    row = m.to(tl.int64)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for j in range(0, r, BLOCK_R):
        rank = j + tl.arange(0, BLOCK_R)
        tdp = tl.load(gdp + row * r + rank, mask=in_m[:, None] & (rank < r), other=0.0)
        a_rows = ga + rank[:, None].to(tl.int64) * a_stride
        ta = tl.load(a_rows + k, mask=(rank < r)[:, None] & in_k, other=0.0)
        acc = add_product(acc, tdp, ta, PRECISION)
    if DROP:
        acc = tl.where(keep_tile(m, k0, grng, threshold, BLOCK_K), acc * keep_scale, 0.0)

    if BASE == FUSED:
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            tdy = tl.load(gdy + row * dy_stride + n, mask=in_m[:, None] & (n < N), other=0.0)
            w_rows = gweight + n[:, None].to(tl.int64) * weight_stride_n
            tw = tl.load(w_rows + k * weight_stride_k, mask=(n < N)[:, None] & in_k, other=0.0)
            acc = tl.dot(tdy, tw, acc, input_precision=PRECISION)

    out = gdx + row * K + k
    write = in_m[:, None] & in_k
    if BASE == STORED:
        if gslots is not None:
            write &= (tl.load(gslots + m, mask=in_m, other=-1) >= 0)[:, None]
        acc += tl.load(out, mask=write, other=0.0).to(tl.float32)
    tl.store(out, acc.to(gdx.dtype.element_ty), mask=write)


def linear_backward(
    dy: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    p: Tensor,
    scale: float,
    p_drop: float,
    rng: Tensor | None,
    need_dx: bool,
    need_dpages: bool,
    *,
    fuse_base: bool = True,
) -> tuple[Tensor, Tensor]:
    """`loraxs::linear_backward` in fp32, bf16 and fp16 with r ≤ 256; arguments and results as in the reference.

    `fuse_base` sums dy W and the low-rank part in one kernel; otherwise torch's matmul computes dy W, and a second pass
    over dx adds the rest. A slot outside [−1, S) counts as −1: checking it would wait for the device.
    """
    K = a.shape[1]
    dx = dy.new_empty((*dy.shape[:-1], K) if need_dx else (0,))
    dpages = torch.empty(pages.shape if need_dpages else (0,), dtype=pages.dtype, device=pages.device)
    if dy.numel() == 0 or K == 0:
        return dx.zero_(), dpages.zero_()
    slots = None if slots is None else slots.contiguous()
    if need_dx:
        dq, dp = project_and_rotate(dy, b.mT, pages.mT, slots, scale)
        _sum_rows(dx, dy, weight, a, dp, slots, p_drop, rng, fuse_base)
    else:
        dq = project(dy, b.mT)
    if need_dpages:
        _sum_pages(dpages, dq, as_rows(p), slots, scale)
    return dx, dpages


class Segments(NamedTuple):
    """The rows of every slot, in order: order[starts[i]:starts[i + 1]], cut into chunks[i + 1] − chunks[i] chunks."""

    order: Tensor
    starts: Tensor
    chunks: Tensor


def segments(slots: Tensor, n_slots: int, chunk: int) -> Segments:
    """Sorted on the device: sizes follow from M and S alone. −1 comes before all slots, and what is too large after."""
    ordered, order = torch.sort(slots, stable=True)
    edges = torch.arange(n_slots + 1, dtype=slots.dtype, device=slots.device)
    starts = torch.searchsorted(ordered, edges, out_int32=True)
    chunks = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + (chunk - 1)) // chunk, 0, dtype=torch.int32, out=chunks[1:])
    return Segments(order, starts, chunks)


def unfilled_chunks(M: int, S: int) -> int:
    """By how many the chunks can outnumber those of one slot: every slot that has rows can leave one unfilled."""
    return min(M, S)


def _sum_pages(dpages: Tensor, dq: Tensor, p: Tensor, slots: Tensor | None, scale: float) -> None:
    """dpages_i = s · Σ dq_mᵀ p_m over the rows of slot i."""
    M, r = dq.shape
    S = dpages.shape[0]
    # A chunk writes r² numbers and reads 2 r of every row: with longer ones at high rank, it reads more than it writes.
    chunk = 128 if r <= 64 else 512
    n_chunks = triton.cdiv(M, chunk)
    order = starts = chunks = None
    if slots is not None:
        order, starts, chunks = segments(slots, S, chunk)
        n_chunks += unfilled_chunks(M, S)
    partial = torch.empty(n_chunks, r, r, dtype=torch.float32, device=dq.device)
    block_r = power_of_two(r, 16, 64)
    n_r = triton.cdiv(r, block_r)
    _chunk_kernel[(n_chunks, n_r, n_r)](
        dq, p, order, starts, chunks, partial, M, S, r, p.stride(0), CHUNK=chunk, BLOCK_M=32, BLOCK_R=block_r
    )
    block = power_of_two(r * r, 32, 256)
    total_kernel[(S, triton.cdiv(r * r, block))](
        partial, chunks, dpages, n_chunks, r * r, scale, GROUP=8, BLOCK=block
    )  # fmt: skip


class Tile(NamedTuple):
    """What a program of the GEMM holds: a tile [m, k] of dx, summed n, or r ranks, at a time."""

    m: int
    k: int
    n: int
    r: int
    warps: int
    stages: int


def _tile(dtype: torch.dtype, M: int, even: bool, fused: bool) -> Tile:
    """Its height, which decides over the instruction and so could change the order of sums, is the same for all M."""
    if dtype == torch.float32:
        return Tile(m=64, k=64, n=16, r=16, warps=4, stages=3)
    # A few tokens are bound by the reading of W: narrow tiles spread that over more multiprocessors. (Model.)
    if M <= 512 and fused:
        return Tile(m=128, k=32, n=64, r=32, warps=8, stages=4)
    # Rows that do not begin at multiples of 16 are loaded one by one, whose masks and addresses take registers.
    return Tile(m=128, k=128 if even and fused else 64, n=64, r=32, warps=8, stages=3)


def _sum_rows(
    dx: Tensor, dy: Tensor, weight: Tensor | None, a: Tensor, dp: Tensor, slots: Tensor | None, p_drop: float,
    rng: Tensor | None, fuse_base: bool,
) -> None:  # fmt: skip
    """dx = dy W + mask/(1 − p_drop) · (dp a)."""
    dy, a = as_rows(dy), as_rows(a)
    (M, N), (r, K) = dy.shape, a.shape
    base = ABSENT if weight is None else FUSED
    if weight is not None and not fuse_base:
        base = STORED
        # torch writes into a tensor it is given only where no gradient is recorded.
        with torch.no_grad():
            torch.mm(dy, weight, out=dx.view(M, K))
    threshold, keep_scale = dropout(p_drop)
    tile = _tile(dy.dtype, M, N % 16 == K % 16 == 0, base == FUSED)
    _dx_kernel[(triton.cdiv(M, tile.m) * triton.cdiv(K, tile.k),)](
        dy, weight, dp, a, slots, dx, rng, M, N, K, r,
        dy.stride(0), *((0, 0) if weight is None else weight.stride()), a.stride(0), threshold, keep_scale,
        BASE=base, DROP=p_drop > 0.0, PRECISION=precision(dy.dtype),
        BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_N=tile.n, BLOCK_R=power_of_two(r, 16, tile.r), GROUP=GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
