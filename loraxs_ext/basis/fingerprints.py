"""A 64-bit hash of a weight: the same on every device and torch version, sensitive to order and to one ulp.

Two fp32 at a time become a 64-bit word, each word is mixed with an odd factor of its own, and the sums of chunks are
mixed with their position, all in integers modulo 2^64. Meant against mistakes, not against forgery.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_CHUNK = 2048
# 256 KiB a thread stay in a CPU's second-level cache, where hashing is twice as fast; a device wants larger pieces.
_ROWS_CPU, _ROWS_DEVICE = 16, 8192
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    return value - (1 << 64) if value >> 63 else value


def _fold(x: Tensor, shift: int) -> Tensor:
    """x ^ (x >> shift) with a logical shift of int64 tensors, whose own shift is arithmetic."""
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(x)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64 tensors that wrap around."""
    x = _fold(x, 30) * _signed(0xBF58476D1CE4E5B9)
    x = _fold(x, 27) * _signed(0x94D049BB133111EB)
    return _fold(x, 31)


def _stream(count: int, start: int, device: torch.device) -> Tensor:
    """SplitMix64 outputs number start…start + count − 1, as int64."""
    return _mix(torch.arange(start + 1, start + count + 1, device=device) * _signed(_GOLDEN))


@functools.lru_cache(maxsize=16)
def _factors(device: torch.device) -> Tensor:
    """The odd factors of one chunk."""
    return _stream(_CHUNK, 0, device) | 1


def _scramble(words: Tensor, factors: Tensor) -> Tensor:
    """Mix each word with its factor so that differences do not cancel in a sum.

    A product carries differences upwards only, and a difference in the sign bits alone is the same for every factor:
    hence a fold before and after. The first is not by 32 bits, or two signs of one word would hide each other.
    """
    return _fold(_fold(words, 29).mul_(factors), 32)


def _hash_words(words: Tensor) -> int:
    """Hash of a flat int64 tensor."""
    factors = _factors(words.device)
    whole = words.numel() // _CHUNK * _CHUNK
    step = _ROWS_CPU * torch.get_num_threads() if words.device.type == "cpu" else _ROWS_DEVICE
    sums = [_scramble(rows, factors).sum(1) for rows in words[:whole].view(-1, _CHUNK).split(step)]
    if whole < words.numel():
        sums.append(_scramble(words[whole:], factors[: words.numel() - whole]).sum(0, keepdim=True))
    chunks = torch.cat(sums)
    return int(_mix(chunks ^ _stream(len(chunks), _CHUNK, words.device)).sum()) & _MASK


def fingerprint(W: Tensor) -> str:
    """Hash of a tensor's shape and values.

    Values count as fp32, so a bf16 or fp16 weight and its exact fp32 copy agree; fp64 values that fp32 cannot hold
    count as fp64. Strides, device and thread count don't matter.

    Args:
        W: any shape, a floating-point dtype.

    Returns:
        16 hexadecimal digits.

    Raises:
        TypeError: not a floating-point tensor.
    """
    if not W.is_floating_point():
        raise TypeError(f"W must be a floating-point tensor, got {W.dtype}")
    values = W.detach().float()
    if W.dtype == torch.float64 and not torch.equal(values.double(), W.detach()):
        values = W.detach()
    header = torch.tensor([values.element_size(), W.ndim, *W.shape])
    flat = values.contiguous().flatten()
    if flat.element_size() == 4 and (flat.numel() % 2 or flat.storage_offset() % 2):
        flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
    words = _hash_words(flat.view(torch.int64)) if flat.numel() else 0
    return f"{(_hash_words(header) * _GOLDEN ^ words) & _MASK:016x}"
