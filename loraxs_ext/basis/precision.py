"""Guards around the decomposition: true fp32 products, no gradients, scales without overflow, finite weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Squares and sums of squares of entries within 2^±24 stay far inside the range of fp32.
_SAFE_EXPONENT = 24


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run products in their own precision whatever the process has switched on: TF32, bf16 passes, autocast, grad."""
    before = torch.get_float32_matmul_precision()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse what has no singular value decomposition.

    Raises:
        TypeError: not a floating-point tensor (a quantised weight must be dequantised first).
        ValueError: fewer than two dimensions, or NaN or Inf among the entries.
    """
    if weight.dtype not in _FLOATS:
        raise TypeError(
            f"weight {name!r} must be fp32, fp64, bf16 or fp16, got {weight.dtype}; dequantise it before decomposing"
        )
    if weight.ndim < 2:
        raise ValueError(f"weight {name!r} must have at least 2 dimensions, got shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(weight))
    if low != low or high != high:
        raise ValueError(f"weight {name!r} contains NaN")
    if low == float("-inf") or high == float("inf"):
        raise ValueError(f"weight {name!r} contains Inf")


def times_power_of_two(values: Tensor, exponent: Tensor) -> Tensor:
    """values · 2^exponent, in two steps so that no factor leaves the range of the dtype (exponents up to ±250)."""
    half = exponent.div(2, rounding_mode="floor")
    for part in (half, exponent - half):
        values = values * torch.exp2(part.to(values.dtype))
    return values


def prescale(W: Tensor) -> tuple[Tensor, Tensor]:
    """Bring each matrix's largest entry near 1 by a power of two, where it is far from it.

    Args:
        W: [b, N, K], finite.

    Returns:
        The scaled matrices (W itself if none needed it) and the int64 exponents [b]: W = scaled · 2^exponent.
    """
    peak = W.abs().amax((-2, -1)).double()
    exponent = torch.floor(torch.log2(torch.where(peak > 0, peak, 1.0))).long()
    exponent = torch.where(exponent.abs() > _SAFE_EXPONENT, exponent, 0)
    if not bool(exponent.any()):
        return W, exponent
    return times_power_of_two(W, -exponent[:, None, None]), exponent
