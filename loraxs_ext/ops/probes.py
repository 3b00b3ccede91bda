"""Pseudo-random vectors with small integer entries: the same bits on every device, exact in every float type."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .philox import random_u32

# Streams of one seed: each purpose draws from its own.
START, COMPLETION, SIGN, PROBE_U, PROBE_V, PERMUTATION, ANCHOR = range(7)

# popcount of 32 fair bits has variance 8.
PROBE_STD = 8.0**0.5


def _popcount(bits: Tensor) -> Tensor:
    """Number of ones in each unsigned 32-bit value held in an int64 tensor."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) & 0xFFFFFFFF) >> 24


@functools.lru_cache(maxsize=256)
def _probes_int8(rows: int, cols: int, seed: int, stream: int, device: torch.device) -> Tensor:
    return (_popcount(random_u32(rows, cols, seed, stream, device)) - 16).to(torch.int8)


def probes(
    rows: int, cols: int, stream: int, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype
) -> Tensor:
    """Rows of independent integers in [−16, 16] with mean 0 and variance 8, as good as Gaussian ones for sketching.

    Entry (i, j) is popcount(u32) − 16 of one Philox number, so it depends on (seed, stream, i, j) alone.

    Args:
        rows, cols: shape of the result.
        stream: purpose of the numbers, one of the constants of this module.
        seed: 64-bit seed.
        device, dtype: of the result; the values are exact in any float type.

    Returns:
        [rows, cols].
    """
    return _probes_int8(rows, cols, seed, stream, torch.device(device)).to(dtype)
