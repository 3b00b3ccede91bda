"""loraxs::orthonormalize: Cholesky QR, twice, of fp32 or half columns; everything that is k × k in fp64.

Each pass is three launches: partial Gram matrices, their Cholesky factor and its inverse (one program a matrix), and
the product with the inverse. Nothing is read back, so dependent columns are found on the device: a pivot that is
rounding noise marks its column as lost, a fixed pseudo-random vector takes its place, and the second pass makes it
orthogonal to the others. With the Gram matrix in fp64, the first pass leaves a condition of about 1 whatever the
columns were, and a shift is not needed (cf. Fukaya et al., "Shifted Cholesky QR", SIAM J. Sci. Comput. 42, 2020).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..probes import COMPLETION, probes

PASSES = 2
# The squared distance of a unit column from the span of those before it is known to about 1e-15. Below this it is
# noise, and the column differs from a combination of the others by less than 3 ulp of fp32.
LOST = 1e-13
# Rows of Y that one program sums up; fixed, so that the order of the sums depends on n alone.
SPLIT_ROWS = 1024
# Extents of tiles: rows of Y at a time, columns in products, and the block of the factorisation, which is eliminated
# column by column in registers.
BLOCK_N = 32
BLOCK_K = 32
BLOCK_C = 32
# Triton before 3.9 multiplies fp64 on the ordinary cores of sm_100, where the last product would spill: fewer rows.
TENSOR_CORES_FROM_BLACKWELL_ON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
BLOCK_N_ORDINARY = 16


@triton.jit
def _gram_kernel(
    gY, gpartial, n, k, stride_b, stride_n, stride_k,
    SPLIT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[batch, split, k, k] = Yᵀ Y over SPLIT_ROWS rows of Y [batch, n, k], its lower block triangle only."""
    tile, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(k, BLOCK)
    i, j = tile // tiles, tile % tiles
    if i >= j:
        left, right = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        gY += batch * stride_b
        acc = tl.zeros((BLOCK, BLOCK), tl.float64)
        for start in range(split * SPLIT_ROWS, min(n, (split + 1) * SPLIT_ROWS), BLOCK_N):
            row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            tleft = tl.load(
                gY + row[None, :] * stride_n + left[:, None] * stride_k,
                mask=(row < n)[None, :] & (left < k)[:, None], other=0.0,
            ).to(tl.float64)  # fmt: skip
            tright = tl.load(
                gY + row[:, None] * stride_n + right[None, :] * stride_k,
                mask=(row < n)[:, None] & (right < k)[None, :], other=0.0,
            ).to(tl.float64)  # fmt: skip
            acc = tl.dot(tleft, tright, acc, out_dtype=tl.float64)
        gpartial += (batch * tl.num_programs(1) + split) * k * k
        tl.store(gpartial + left[:, None] * k + right, acc, mask=(left < k)[:, None] & (right < k))


@triton.jit
def _block(pointer, i, j, k, BLOCK: tl.constexpr):
    """Pointers to block (i, j) of a k × k matrix, and which of them lie inside."""
    row, col = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    return pointer + row[:, None] * k + col, (row < k)[:, None] & (col < k)


@triton.jit
def _factor_kernel(gpartial, glength, ginverse, glost, splits, k, LOST: tl.constexpr, BLOCK: tl.constexpr):
    """inverse[batch, k, k] = L⁻¹ of YᵀY = L Lᵀ, with zeros for lost columns, which lost[batch, k] names.

    The first of the partial sums becomes G, and then L, block column by block column; length[batch, k] is its diagonal.
    """
    batch = tl.program_id(0).to(tl.int64)
    gpartial += batch * splits * k * k
    ginverse += batch * k * k
    glength += batch * k
    glost += batch * k
    blocks = tl.cdiv(k, BLOCK)
    index = tl.arange(0, BLOCK)
    diagonal = index[:, None] == index

    for i in range(blocks):
        for j in range(i + 1):
            place, inside = _block(gpartial, i, j, k, BLOCK)
            total = tl.load(place, mask=inside, other=0.0)
            for split in range(1, splits):
                total += tl.load(place + split * k * k, mask=inside, other=0.0)
            tl.store(place, total, mask=inside)
            if i == j:
                column = i * BLOCK + index
                tl.store(glength + column, tl.sum(tl.where(diagonal, total, 0.0), 0), mask=column < k)
    tl.debug_barrier()

    for j in range(blocks):
        # The diagonal block by elimination: the rows below subtract multiples of the pivot's row, and those of an
        # identity do the same and become the inverse of the unit triangle.
        place, inside = _block(gpartial, j, j, k, BLOCK)
        rest = tl.load(place, mask=inside, other=0.0)
        column = j * BLOCK + index
        length = tl.load(glength + column, mask=column < k, other=0.0)
        inverse = diagonal.to(tl.float64)
        lost = tl.zeros((BLOCK,), tl.int32)
        for step in range(BLOCK):
            here = index == step
            pivot_row = tl.sum(tl.where(here[:, None], rest, 0.0), 0)
            inverse_row = tl.sum(tl.where(here[:, None], inverse, 0.0), 0)
            pivot = tl.sum(tl.where(here, pivot_row, 0.0), 0)
            # A comparison with NaN is false: NaN is no lost column and goes through to the result.
            noise = pivot <= LOST * tl.sum(tl.where(here, length, 0.0), 0)
            scaled = tl.where(noise, 0.0, 1.0 / tl.where(noise, 1.0, pivot))
            factor = tl.where(index > step, pivot_row * scaled, 0.0)
            rest -= factor[:, None] * pivot_row
            inverse -= factor[:, None] * inverse_row
            inverse = tl.where(here[:, None], inverse_row * tl.sqrt(scaled), inverse)
            lost = tl.where(here, noise.to(tl.int32), lost)
        tl.store(_block(ginverse, j, j, k, BLOCK)[0], inverse, mask=inside)
        tl.store(glost + column, lost, mask=column < k)
        # The blocks of L below, and what they leave of G.
        for i in range(j + 1, blocks):
            place, inside = _block(gpartial, i, j, k, BLOCK)
            below = tl.load(place, mask=inside, other=0.0)
            tl.store(place, tl.dot(below, tl.trans(inverse), out_dtype=tl.float64), mask=inside)
        tl.debug_barrier()
        for i in range(j + 1, blocks):
            place, inside = _block(gpartial, i, j, k, BLOCK)
            left = tl.load(place, mask=inside, other=0.0)
            for m in range(j + 1, i + 1):
                place, inside = _block(gpartial, m, j, k, BLOCK)
                right = tl.load(place, mask=inside, other=0.0)
                place, inside = _block(gpartial, i, m, k, BLOCK)
                remains = tl.load(place, mask=inside, other=0.0)
                tl.store(place, tl.dot(-left, tl.trans(right), remains, out_dtype=tl.float64), mask=inside)
        tl.debug_barrier()

    # The blocks below the diagonal of the inverse, from the top: X_ij = −X_ii Σ L_im X_mj.
    for i in range(1, blocks):
        place, inside = _block(ginverse, i, i, k, BLOCK)
        own = tl.load(place, mask=inside, other=0.0)
        for j in range(i):
            total = tl.zeros((BLOCK, BLOCK), tl.float64)
            for m in range(j, i):
                place, inside = _block(gpartial, i, m, k, BLOCK)
                left = tl.load(place, mask=inside, other=0.0)
                place, inside = _block(ginverse, m, j, k, BLOCK)
                total = tl.dot(left, tl.load(place, mask=inside, other=0.0), total, out_dtype=tl.float64)
            place, inside = _block(ginverse, i, j, k, BLOCK)
            tl.store(place, tl.dot(-own, total, out_dtype=tl.float64), mask=inside)
        tl.debug_barrier()


@triton.jit
def _apply_kernel(
    gY, ginverse, glost, gstand_in, gQ, n, k, stride_b, stride_n, stride_k, stand_in_scale,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Q[batch, k, n] = L⁻¹ Yᵀ in fp32, and scaled rows of stand_in[k, n] for lost columns."""
    j, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    out = j * BLOCK + tl.arange(0, BLOCK)
    gY += batch * stride_b
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float64)
    for i in range(j + 1):
        column = i * BLOCK + tl.arange(0, BLOCK)
        place, inside = _block(ginverse + batch * k * k, j, i, k, BLOCK)
        tY = tl.load(
            gY + column[:, None] * stride_k + row * stride_n,
            mask=(column < k)[:, None] & (row < n), other=0.0,
        ).to(tl.float64)  # fmt: skip
        acc = tl.dot(tl.load(place, mask=inside, other=0.0), tY, acc, out_dtype=tl.float64)
    mask = (out < k)[:, None] & (row < n)
    place = out[:, None].to(tl.int64) * n + row
    lost = tl.load(glost + batch * k + out, mask=out < k, other=0)
    stand_in = tl.load(gstand_in + place, mask=mask & (lost != 0)[:, None], other=0).to(tl.float32) * stand_in_scale
    tl.store(gQ + batch * k * n + place, tl.where((lost != 0)[:, None], stand_in, acc.to(tl.float32)), mask=mask)


def orthonormalize(Y: Tensor) -> Tensor:
    """See `reference.orthonormalize`; fp32, bf16 and fp16, k ≤ 256. NaN or Inf in Y become NaN in Q."""
    batch, n, k = Y.shape
    if Y.numel() == 0:
        return torch.empty((batch, k, n), dtype=torch.float32, device=Y.device).mT
    splits, tiles = triton.cdiv(n, SPLIT_ROWS), triton.cdiv(k, BLOCK_K)
    scratch = torch.empty((batch, splits, k, k), dtype=torch.float64, device=Y.device)
    length = torch.empty((batch, k), dtype=torch.float64, device=Y.device)
    inverse = torch.empty((batch, k, k), dtype=torch.float64, device=Y.device)
    lost = torch.empty((batch, k), dtype=torch.int32, device=Y.device)
    # Integers of variance 8: as exact in int8 as in any other type.
    stand_in = probes(k, n, COMPLETION, device=Y.device, dtype=torch.int8)
    source, apply_n = Y, apply_rows(_major_capability(Y.device))
    for _ in range(PASSES):
        strides, Q = source.stride(), torch.empty((batch, k, n), dtype=torch.float32, device=Y.device)
        _gram_kernel[(tiles * tiles, splits, batch)](
            source, scratch, n, k, *strides, SPLIT_ROWS=SPLIT_ROWS, BLOCK_N=BLOCK_N, BLOCK=BLOCK_K
        )
        _factor_kernel[(batch,)](scratch, length, inverse, lost, splits, k, LOST=LOST, BLOCK=BLOCK_C)
        _apply_kernel[(triton.cdiv(n, apply_n), tiles, batch)](
            source, inverse, lost, stand_in, Q, n, k, *strides, (8.0 * n) ** -0.5, BLOCK_N=apply_n, BLOCK=BLOCK_K
        )
        source = Q.mT
    return source


def apply_rows(major: int) -> int:
    """Rows of Y that the last product takes at a time, by the major compute capability."""
    return BLOCK_N if major < 10 or TENSOR_CORES_FROM_BLACKWELL_ON else BLOCK_N_ORDINARY


@cache
def _major_capability(device: torch.device) -> int:
    """0 where there is no GPU: for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
