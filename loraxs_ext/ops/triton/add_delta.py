"""y + s · (p R_slotᵀ) bᵀ over a base layer's y: p and q from `project`, then one pass over tiles of y.

The pass costs the reading and writing of y. A base row (slot −1) is not computed at all: in place it is not touched,
else it is copied. A row's bits do not depend on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .project import project_and_rotate
from .tiles import MIN_TOKENS, add_product, as_rows, power_of_two, precision

# A tile of y and what it is made of: 64 columns make the rows of b one line of L2 in half types.
BLOCK_N = 64


@triton.jit
def _expand_kernel(
    gy, gq, gb, slots, gout, M, N, r, y_stride, out_stride, b_n, b_i,
    IN_PLACE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here, wanted = tokens < M, columns < N
    token64, column64 = tokens.to(tl.int64), columns.to(tl.int64)

    # Columns of y are the rows of the product: the order of sums does not depend on the number of tokens.
    delta = tl.zeros((BLOCK_N, TOKENS), tl.float32)
    for i0 in range(0, r, RANKS):
        i = i0 + tl.arange(0, RANKS)
        tq = tl.load(gq + token64[:, None] * r + i[None, :], mask=here[:, None] & (i < r)[None, :], other=0.0)
        tb = tl.load(gb + column64[:, None] * b_n + i[None, :] * b_i, mask=wanted[:, None] & (i < r), other=0.0)
        delta = add_product(delta, tb, tl.trans(tq), PRECISION)

    chosen = here
    if slots is not None:
        chosen = tl.load(slots + tokens, mask=here, other=-1) >= 0
    ty = tl.load(gy + token64[:, None] * y_stride + columns[None, :], mask=here[:, None] & wanted[None, :], other=0.0)
    out = (ty.to(tl.float32) + tl.trans(delta)).to(gout.dtype.element_ty)
    at = gout + token64[:, None] * out_stride + columns[None, :]
    if IN_PLACE:
        tl.store(at, out, mask=chosen[:, None] & wanted[None, :])
    else:
        tl.store(at, tl.where(chosen[:, None], out, ty), mask=here[:, None] & wanted[None, :])


def add_delta(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`loraxs::add_delta` in fp32, bf16 and fp16 with r ≤ 256; arguments and results as in `reference.add_delta`.

    A slot outside [−1, S) counts as −1: checking it would wait for the device.
    """
    rows = as_rows(y)
    out = torch.empty(rows.shape, dtype=y.dtype, device=y.device)
    p, q = project_and_rotate(x, a, pages, slots, scale, p_drop, rng)
    expand(out, rows, b, slots, q)
    return out.view(y.shape), p


def add_delta_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> None:
    """`add_delta` written into y."""
    rows = as_rows(y)
    _, q = project_and_rotate(x, a, pages, slots, scale, p_drop, rng)
    expand(rows, rows, b, slots, q)
    # Rows of some layouts are only to be had as a copy.
    if rows.data_ptr() != y.data_ptr():
        y.copy_(rows.view(y.shape))


def expand(out: Tensor, y: Tensor, b: Tensor, slots: Tensor | None, q: Tensor) -> None:
    """out = y + q bᵀ, a base row bitwise y; out may be y.

    Args:
        out, y: [M, N], contiguous rows of any stride.
        b: [N, r], dtype of y.
        slots: int32 [M] or None.
        q: [M, r] in fp32, contiguous.
    """
    (M, r), N = q.shape, b.shape[0]
    if M == 0 or N == 0:
        return
    tokens = power_of_two(M, MIN_TOKENS, 64)
    _expand_kernel[(triton.cdiv(M, tokens), triton.cdiv(N, BLOCK_N))](
        y, q, b, slots, out, M, N, r, y.stride(0), out.stride(0), *b.stride(),
        IN_PLACE=out is y, TOKENS=tokens, BLOCK_N=BLOCK_N,
        RANKS=power_of_two(r, 16, 64 if y.dtype != torch.float32 else 32), PRECISION=precision(y.dtype), num_warps=4,
    )  # fmt: skip
