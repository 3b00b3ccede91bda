"""Counter-based random numbers that are the same bits on every device, torch version and thread count.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) in int64
tensors that hold unsigned 32-bit values. Adapter dropout and the sketch of the range finder both draw from it, so
a mask can be recomputed in the backward pass, and a basis on another machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """32×32 → (high, low) 32 bits. The halves of `b` keep every int64 intermediate below 2^49: no overflow."""
    low = a * (b & 0xFFFF)
    mid = a * (b >> 16) + (low >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of broadcastable int64 counters and a key, each holding an unsigned 32-bit value."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _split(value: int | Tensor) -> tuple[Tensor | int, Tensor | int]:
    """Low and high 32 bits of a 64-bit integer, as unsigned values."""
    return value & _MASK32, (value >> 32) & _MASK32


def random_u32(
    rows: int, cols: int, seed: int | Tensor, offset: int | Tensor = 0, device: torch.device | str | None = None
) -> Tensor:
    """Random 32-bit integers u[m, k] that depend on (seed, offset, m, k) alone, not on `rows` or `cols`.

    u[m, k] is lane k mod 4 of Philox4x32-10 with counter (k div 4, m, offset_lo, offset_hi) and key (seed_lo,
    seed_hi).

    Args:
        rows, cols: shape of the result, each below 2^32.
        seed, offset: 64-bit integers, or 0-dim int64 tensors on `device` (then nothing is read back to the host).
        device: where the result lies; the bits do not depend on it.

    Returns:
        int64 tensor [rows, cols] with values in [0, 2^32).
    """
    blocks = (cols + 3) // 4
    block = torch.arange(blocks, device=device, dtype=torch.int64)[None, :]
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None]
    offset_lo, offset_hi = _split(offset)
    zero = torch.zeros((), device=device, dtype=torch.int64)
    lanes = philox4x32((block + 0 * row, row + 0 * block, zero + offset_lo, zero + offset_hi), _split(seed))
    return torch.stack(torch.broadcast_tensors(*lanes), -1).reshape(rows, 4 * blocks)[:, :cols]


def keep_mask(rows: int, cols: int, p_drop: float, rng: Tensor) -> Tensor:
    """Dropout mask of the op contract: keep[m, k] ⇔ u[m, k] ≥ round(p_drop · 2^32).

    Args:
        rows, cols: shape of the mask.
        p_drop: probability of dropping an entry, in [0, 1).
        rng: int64 [2] = (seed, offset) on the device where the mask is wanted.

    Returns:
        bool tensor [rows, cols], true where the entry is kept.
    """
    return random_u32(rows, cols, rng[0], rng[1], rng.device) >= drop_threshold(p_drop)


def drop_threshold(p_drop: float) -> int:
    """The smallest u32 that keeps an entry; at most 2^32 − 1, so that it fits an unsigned 32-bit register."""
    return min(round(p_drop * 2**32), _MASK32)
