"""loraxs::rescale: one pass over tiles of z; its backward sums dy ∘ z by slots in chunks, as `linear_backward` sums R's.

Both read and write each number once: memory is all that limits them. With slots, the rows of a chunk lie anywhere, and
dz is a pass of its own, which also passes on the base rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_backward import chunk_bounds, segments, total_kernel, unfilled_chunks
from .tiles import as_rows, power_of_two

# A tile of one row after the other: 512 contiguous bytes of a half type, and enough rows for 16 numbers a thread.
BLOCK_N = 256
MAX_TOKENS = 8
# Rows that are summed before the chunks are; each leaves one row of partial sums.
CHUNK = 128
BACK_N = 128


@triton.jit
def _rescale_kernel(
    gz, gg, gbias, slots, gy, M, N, S, z_stride,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    inside = (token < M)[:, None] & in_n
    token64 = token[:, None].to(tl.int64)
    value = tl.load(gz + token64 * z_stride + n, mask=inside, other=0.0).to(tl.float32)
    if slots is None:
        value *= tl.load(gg + n, mask=in_n, other=0.0).to(tl.float32)
    else:
        slot = tl.load(slots + token, mask=token < M, other=-1)
        # What is outside [0, S) counts as a base row, so no row of g is overrun.
        chosen = ((slot >= 0) & (slot < S))[:, None]
        value *= tl.load(gg + slot[:, None].to(tl.int64) * N + n, mask=inside & chosen, other=1.0).to(tl.float32)
    if gbias is not None:
        value += tl.load(gbias + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(gy + token64 * N + n, value.to(gy.dtype.element_ty), mask=inside)


@triton.jit
def _chunk_kernel(
    gdy, gz, gg, gorder, gstarts, gchunks, gdz, gpartial, M, N, S, dy_stride, z_stride,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[chunk, n] = Σ dy ∘ z over the rows of one chunk and, without slots, their dz = g ∘ dy."""
    chunk = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    if gorder is None:
        begin, end = chunk * CHUNK, M
    else:
        # The grid is as long as any slots could need; nothing is left to do beyond the last chunk.
        if chunk >= tl.load(gchunks + S):
            return
        begin, end = chunk_bounds(chunk, gstarts, gchunks, S, CHUNK)
    if gdz is not None:
        scale = tl.load(gg + n, mask=in_n, other=0.0).to(tl.float32)

    acc = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(0, CHUNK, TOKENS):
        at = begin + step + tl.arange(0, TOKENS)
        here = at < end
        row = at.to(tl.int64) if gorder is None else tl.load(gorder + at, mask=here, other=0)
        inside = here[:, None] & in_n
        tdy = tl.load(gdy + row[:, None] * dy_stride + n, mask=inside, other=0.0).to(tl.float32)
        tz = tl.load(gz + row[:, None] * z_stride + n, mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(tdy * tz, 0)
        if gdz is not None:
            tl.store(gdz + row[:, None] * N + n, (scale * tdy).to(gdz.dtype.element_ty), mask=inside)
    tl.store(gpartial + chunk.to(tl.int64) * N + n, acc, mask=in_n)


def rescale(z: Tensor, g: Tensor, slots: Tensor | None, bias: Tensor | None) -> Tensor:
    """`loraxs::rescale` in fp32, bf16 and fp16; arguments and result as in `reference.rescale`.

    A slot outside [−1, S) counts as −1: checking it would wait for the device.
    """
    rows = as_rows(z)
    M, N = rows.shape
    y = torch.empty((M, N), dtype=z.dtype, device=z.device)
    if M and N:
        tokens = power_of_two(M, 1, MAX_TOKENS)
        _rescale_kernel[(triton.cdiv(M, tokens), triton.cdiv(N, BLOCK_N))](
            rows, g.contiguous(), None if bias is None else bias.contiguous(),
            None if slots is None else slots.contiguous(), y, M, N, g.shape[0], rows.stride(0),
            TOKENS=tokens, BLOCK_N=BLOCK_N,
        )  # fmt: skip
    return y.view(z.shape)


def rescale_backward(
    dy: Tensor, z: Tensor | None, g: Tensor, slots: Tensor | None, need_dz: bool
) -> tuple[Tensor, Tensor]:
    """`loraxs::rescale_backward` in fp32, bf16 and fp16; arguments and results as in `reference.rescale_backward`."""
    dz, dg = dy.new_empty(dy.shape if need_dz else 0), g.new_empty(g.shape if z is not None else 0)
    rows = as_rows(dy)
    (M, N), S = rows.shape, g.shape[0]
    if M == 0 or N == 0:
        return dz, dg.zero_()
    fused = need_dz and z is not None and slots is None
    if need_dz and not fused:
        dz = rescale(dy, g, slots, None)
    if z is None:
        return dz, dg
    n_chunks = triton.cdiv(M, CHUNK)
    order = starts = chunks = None
    if slots is not None:
        order, starts, chunks = segments(slots.contiguous(), S, CHUNK)
        n_chunks += unfilled_chunks(M, S)
    partial = torch.empty(n_chunks, N, dtype=torch.float32, device=dy.device)
    kept = as_rows(z)
    _chunk_kernel[(n_chunks, triton.cdiv(N, BACK_N))](
        rows, kept, g.contiguous() if fused else None, order, starts, chunks, dz if fused else None, partial,
        M, N, S, rows.stride(0), kept.stride(0), CHUNK=CHUNK, TOKENS=16, BLOCK_N=BACK_N,
    )  # fmt: skip
    block = power_of_two(N, 32, 256)
    total_kernel[(S, triton.cdiv(N, block))](partial, chunks, dg, n_chunks, N, 1.0, GROUP=8, BLOCK=block)
    return dz, dg
