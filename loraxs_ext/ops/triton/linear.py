"""y = x Wᵀ + bias + s · (p R_slotᵀ) bᵀ: many tokens here, few in `decode`.

For many tokens p and q come first (`project`). Then one product of tiles runs along K and, in the same sums, along r:
[x | q] · [W | b]ᵀ without the concatenation, so y is written once and rounded once.

The tile is the same for every M, so a row's bits do not depend on the other rows, as long as M stays above
`decode.MAX_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import MAX_FUSED_RANK, MAX_TOKENS, decode, decode_rotated
from .project import project_and_rotate, rotate
from .tiles import add_product, as_rows, power_of_two, precision

# What finishes `linear` for many tokens: y of (x, weight, bias, b, slots, q), see `one_pass`.
Product = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor], Tensor]

# Token tiles that are worked on together across N, so that their rows of x stay in L2. (Model, not measured.)
GROUP = 8


@triton.jit
def _linear_kernel(
    gx, gw, bias, gq, gb, gy, M, N, K, r, x_stride, w_stride, b_n, b_i,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs walk GROUP token tiles by all column tiles, column by column.
    token_tiles, column_tiles = tl.cdiv(M, TOKENS), tl.cdiv(N, BLOCK_N)
    group, within = tl.program_id(0) // (GROUP * column_tiles), tl.program_id(0) % (GROUP * column_tiles)
    height = tl.minimum(token_tiles - group * GROUP, GROUP)
    tokens = (group * GROUP + within % height) * TOKENS + tl.arange(0, TOKENS)
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    here, wanted = tokens < M, columns < N
    token64, column64 = tokens.to(tl.int64), columns.to(tl.int64)

    acc = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    x_rows = gx + token64[:, None] * x_stride
    w_rows = gw + column64[None, :] * w_stride
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        tx = tl.load(x_rows + ks[None, :], mask=here[:, None] & (ks < K)[None, :], other=0.0)
        tw = tl.load(w_rows + ks[:, None], mask=(ks < K)[:, None] & wanted[None, :], other=0.0)
        acc = tl.dot(tx, tw, acc, input_precision=PRECISION)
    # A base row has q = 0. Its sums start at +0 and so are never -0: products with zero leave their bits alone.
    for i0 in range(0, r, RANKS):
        i = i0 + tl.arange(0, RANKS)
        tq = tl.load(gq + token64[:, None] * r + i[None, :], mask=here[:, None] & (i < r)[None, :], other=0.0)
        tb = tl.load(gb + i[:, None] * b_i + column64[None, :] * b_n, mask=(i < r)[:, None] & wanted, other=0.0)
        acc = add_product(acc, tq, tb, PRECISION)

    if bias is not None:
        acc += tl.load(bias + columns, mask=wanted, other=0.0).to(tl.float32)[None, :]
    at = gy + token64[:, None] * N + columns[None, :]
    tl.store(at, acc.to(gy.dtype.element_ty), mask=here[:, None] & wanted[None, :])


def one_pass(x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slots: Tensor | None, q: Tensor) -> Tensor:
    """y [M, N] = x Wᵀ + bias + q bᵀ in one kernel.

    Args:
        x: [M, K], contiguous rows of any stride.
        weight: [N, K], contiguous rows of any stride, dtype of x.
        bias: [N] or None.
        b: [N, r], dtype of x.
        slots: int32 [M] or None; not needed here, as q is zero where a slot is −1.
        q: [M, r] in fp32.
    """
    (M, K), (N, r) = x.shape, b.shape
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    half = x.dtype != torch.float32
    tokens = block_n = 128 if half else 64
    _linear_kernel[(triton.cdiv(M, tokens) * triton.cdiv(N, block_n),)](
        x, weight, bias, q, b, y, M, N, K, r, x.stride(0), weight.stride(0), *b.stride(),
        GROUP=GROUP, TOKENS=tokens, BLOCK_N=block_n, BLOCK_K=64 if half else 32,
        RANKS=power_of_two(r, 16, 32 if half else 16), PRECISION=precision(x.dtype), num_warps=8 if half else 4,
        num_stages=3,
    )  # fmt: skip
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
    *,
    product: Product = one_pass,
) -> tuple[Tensor, Tensor]:
    """`loraxs::linear` in fp32, bf16 and fp16 with r ≤ 256; arguments and results as in `reference.linear`.

    `product` computes y from q where there are more than MAX_TOKENS tokens. A slot outside [−1, S) counts as −1:
    checking it would wait for the device.
    """
    rows, weight, a, bias = as_rows(x), as_rows(weight), as_rows(a), bias if bias is None else bias.contiguous()
    if rows.shape[0] <= MAX_TOKENS and b.shape[1] <= MAX_FUSED_RANK and p_drop == 0.0 and not _is_empty(rows, weight):
        y, p = decode(rows, weight, bias, a, b, pages, slots, scale)
    else:
        p, q = project_and_rotate(rows, a, pages, slots, scale, p_drop, rng)
        y = _finish(rows, weight, bias, b, slots, q, product)
    return y.view(*x.shape[:-1], b.shape[0]), p


def linear_projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None,
    scale: float,
    *,
    product: Product = one_pass,
) -> Tensor:
    """`loraxs::linear_projected`; arguments and result as in `reference.linear_projected`, limits as in `linear`."""
    rows, weight, bias = as_rows(x), as_rows(weight), bias if bias is None else bias.contiguous()
    q = rotate(p, pages, slots, scale)
    return _finish(rows, weight, bias, b, slots, q, product).view(*x.shape[:-1], b.shape[0])


def _finish(
    x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slots: Tensor | None, q: Tensor, product: Product
) -> Tensor:
    M, N = x.shape[0], weight.shape[0]
    if _is_empty(x, weight):
        y = torch.zeros(M, N, dtype=x.dtype, device=x.device)
        return y if bias is None else y + bias
    if M <= MAX_TOKENS:
        return decode_rotated(x, weight, bias, b, q)
    return product(x, weight, bias, b, slots, q)


def _is_empty(x: Tensor, weight: Tensor) -> bool:
    return x.numel() == 0 or weight.numel() == 0
