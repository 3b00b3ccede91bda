"""A 64-bit hash of a weight: the same on every device and torch version, sensitive to order and to one ulp.

Multilinear hashing in integers modulo 2^64 (Lemire and Kaser, "Strongly universal string hashing is fast", 2014):
products with fixed odd weights within a chunk, mixed chunk by chunk with the position. Meant against mistakes, not
against forgery.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_CHUNK = 4096
# About 4 MiB of int64 at a time stay in the cache of a CPU; an accelerator wants larger pieces.
_ROWS_CPU, _ROWS_DEVICE = 128, 8192
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64 tensors that wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # int64 shifts are arithmetic: the mask makes them logical.
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x


def _stream(count: int, start: int, device: torch.device) -> Tensor:
    """SplitMix64 outputs number start…start + count − 1, as int64."""
    return _mix((torch.arange(start + 1, start + count + 1, device=device)) * _signed(_GOLDEN))


@functools.lru_cache(maxsize=16)
def _weights(device: torch.device) -> Tensor:
    """The odd factors of one chunk."""
    return _stream(_CHUNK, 0, device) | 1


def _hash_words(words: Tensor) -> int:
    """Hash of a flat int32 tensor."""
    weights = _weights(words.device)
    tail = -words.numel() % _CHUNK
    full = words[: words.numel() - words.numel() % _CHUNK].view(-1, _CHUNK)
    step = _ROWS_CPU if words.device.type == "cpu" else _ROWS_DEVICE
    sums = [(rows.long() * weights).sum(1) for rows in full.split(step)]
    if tail:
        sums.append((words[full.numel() :].long() * weights[: _CHUNK - tail]).sum().reshape(1))
    chunks = torch.cat(sums) if sums else words.new_zeros(0, dtype=torch.int64)
    position = _stream(len(chunks), _CHUNK, words.device)
    return int(_mix(chunks ^ position).sum()) & _MASK


def fingerprint(W: Tensor) -> str:
    """Hash of a weight's shape and values.

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
    W = W.detach()
    values = W.float()
    if W.dtype == torch.float64 and not torch.equal(values.double(), W):
        values = W
    words = values.contiguous().view(-1).view(torch.int32)
    header = torch.tensor([values.element_size(), W.ndim, *W.shape], dtype=torch.int32)
    return f"{(_hash_words(header) * _GOLDEN ^ _hash_words(words)) & _MASK:016x}"
