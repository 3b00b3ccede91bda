"""What all kernels share: how products are summed and rounded, the dropout mask, and how tensors become rows.

Half types multiply on tensor cores with sums in fp32. p and q stay fp32; where one of them meets a half type in a
product it goes in as the sum of two halves, so that nothing of width r is ever rounded to 8 or 11 bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import drop_threshold

# A token tile below this is padded: tensor cores take the tokens of a product in groups of 8, the compiler of 16.
MIN_TOKENS = 16


@triton.jit
def keep_tile(rows, k0, rng, threshold, BLOCK_K: tl.constexpr):
    """Which entries of a tile of x survive dropout: [T, BLOCK_K] of bool, the bits of `philox.keep_mask`.

    rows: [T] indices m. k0: the tile's first column, a multiple of 4. rng: pointer to (seed, offset).
    threshold: `philox.drop_threshold(p_drop)`.
    """
    offset = tl.load(rng + 1)
    block = (k0 // 4 + tl.arange(0, BLOCK_K // 4)).to(tl.uint32)[None, :]
    row = rows.to(tl.uint32)[:, None]
    zero = block * 0 + row * 0
    c0, c1, c2, c3 = tl.philox(
        tl.load(rng), zero + block, zero + row, zero + offset.to(tl.uint32), zero + (offset >> 32).to(tl.uint32)
    )
    # The four words of a counter belong to four neighbouring columns; join appends the fastest dimension.
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape(rows.shape[0], BLOCK_K)
    # A launcher's 1 arrives as a constant, which is not a tensor.
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def add_product(acc, left, right, PRECISION: tl.constexpr):
    """acc + left · right, where one factor is fp32 and the other has the dtype of the weights.

    A half type meets the fp32 factor as high + low halves: the smaller part first, both exact products in fp32. In
    fp16 a factor beyond 65504 becomes inf, as it would in three fp16 matmuls.
    """
    if left.dtype == right.dtype:
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    elif left.dtype == tl.float32:
        high = left.to(right.dtype)
        acc = tl.dot((left - high.to(tl.float32)).to(right.dtype), right, acc)
        acc = tl.dot(high, right, acc)
    else:
        high = right.to(left.dtype)
        acc = tl.dot(left, (right - high.to(tl.float32)).to(left.dtype), acc)
        acc = tl.dot(left, high, acc)
    return acc


@triton.jit
def load_slots(slots, tokens, mask, n_slots):
    """The slot of every token; −1 for a masked token and for a slot outside [−1, n_slots), so no page is overrun."""
    slot = tl.load(slots + tokens, mask=mask, other=-1)
    return tl.where(slot < n_slots, slot, -1)


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of products in fp32: TF32 only where the user allowed it for matmuls; halves ignore it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, kept within [low, high]: a tile's extent."""
    return min(max(1 << (n - 1).bit_length() if n > 1 else 1, low), high)


def rank_block(r: int) -> int:
    """The extent of r in a tile: a power of two, and at least the 16 that a tensor-core product needs."""
    return power_of_two(r, 16, 256)


def as_rows(t: Tensor) -> Tensor:
    """[..., n] → [M, n] with contiguous rows of any stride; copies only where no such view exists."""
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def dropout(p_drop: float) -> tuple[int, float]:
    """(threshold, keep_scale): the mask's cutoff in u32 and 1 / (1 − p_drop)."""
    return drop_threshold(p_drop), 1.0 / (1.0 - p_drop)
