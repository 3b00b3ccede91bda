"""loraxs::row_scale: a program squares a tile of rows of t = c + s · b R L for one slot, block by block of columns.

Nothing but the two results is written, and W is not read; one launch serves all rows of all slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import power_of_two

# 128 programs for N = 4096 and one slot: about one for every multiprocessor of a large GPU.
BLOCK_N = 32
# Columns of t, and terms of their sums, at a time. The sums run in fp32 on the ordinary cores, because halves would
# cost the norm three digits; tiles of these sizes fill the registers without spilling.
MAX_BLOCK_R = 64
MAX_BLOCK_K = 32

# What c and L are: c = b Σ, L = Σ · c = b, L = 1 · both given, L already multiplied into the pages.
SIGMA, UNIT, GIVEN = (tl.constexpr(form) for form in range(3))


@triton.jit
def _row_scale_kernel(
    grho, gb, gcore, gfirst, gm, gg, ginverse, scale, N, r,
    stride_bn, stride_br, stride_fn, stride_fr, stride_cs, stride_ck, stride_cj,
    FORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g, 1/‖·‖ [S, N] from core [S, r, r] = R or R L; `gfirst` is sigma [r], c [N, r] or nothing, as FORM says."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    in_n = row < N
    b_rows = gb + row[:, None].to(tl.int64) * stride_bn
    gcore += slot * stride_cs
    squares = tl.load(grho + row, mask=in_n, other=0.0)

    for j in range(0, r, BLOCK_R):
        col = j + tl.arange(0, BLOCK_R)
        moved = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for k in range(0, r, BLOCK_K):
            inner = k + tl.arange(0, BLOCK_K)
            tb = tl.load(b_rows + inner * stride_br, mask=in_n[:, None] & (inner < r), other=0.0)
            tcore = tl.load(
                gcore + inner[:, None] * stride_ck + col * stride_cj,
                mask=(inner < r)[:, None] & (col < r), other=0.0,
            )  # fmt: skip
            moved = tl.dot(tb.to(tl.float32), tcore.to(tl.float32), moved, input_precision="ieee")
        if FORM == GIVEN:
            c_rows = gfirst + row[:, None].to(tl.int64) * stride_fn
            tfirst = tl.load(c_rows + col * stride_fr, mask=in_n[:, None] & (col < r), other=0.0)
        else:
            tfirst = tl.load(b_rows + col * stride_br, mask=in_n[:, None] & (col < r), other=0.0).to(tl.float32)
        t = tfirst + scale * moved
        if FORM == SIGMA:
            t *= tl.load(gfirst + col * stride_fr, mask=col < r, other=0.0)
        squares += tl.sum(t * t, 1)

    norm = tl.sqrt_rn(squares)
    # A row of zeros has no direction to scale.
    inverse = tl.where(norm > 0.0, tl.div_rn(1.0, norm), 0.0)
    out = slot * N + row
    tm = tl.load(gm + out, mask=in_n, other=0.0).to(tl.float32)
    tl.store(ginverse + out, inverse, mask=in_n)
    tl.store(gg + out, (tm * inverse).to(gg.dtype.element_ty), mask=in_n)


def row_scale(
    rho: Tensor,
    b: Tensor,
    pages: Tensor,
    sigma: Tensor | None,
    m: Tensor,
    scale: float,
    c: Tensor | None = None,
    root: Tensor | None = None,
    through_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """`loraxs::row_scale` in fp32, bf16 and fp16; arguments and results as in `reference.row_scale`."""
    S, N = m.shape
    r = b.shape[1]
    g, inverse = torch.empty((S, N), dtype=m.dtype, device=m.device), rho.new_empty(S, N)
    if N == 0:
        return g, inverse
    core, first, form = pages, sigma, UNIT if sigma is None else SIGMA
    if c is not None and root is not None:
        # In fp64, because torch may run fp32 matmuls in TF32.
        core, first, form = (pages.double() @ root.double()).float(), c, GIVEN
    block_r = power_of_two(r, 16, MAX_BLOCK_R)
    _row_scale_kernel[(S * triton.cdiv(N, BLOCK_N),)](
        rho.contiguous(), b, core, first, m.contiguous(), g, inverse,
        scale, N, r, *b.stride(), *_strides(first), *core.stride(),
        FORM=form, BLOCK_N=BLOCK_N, BLOCK_R=block_r, BLOCK_K=min(block_r, MAX_BLOCK_K),
    )  # fmt: skip
    return g, inverse


def _strides(first: Tensor | None) -> tuple[int, ...]:
    """Of c [N, r], or of sigma [r] as if it had rows."""
    return (0, 0) if first is None else (0, *first.stride())[-2:]
