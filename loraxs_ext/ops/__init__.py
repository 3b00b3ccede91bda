"""The ops: what each one means (`reference`), who computes it (`backends`), and how it is called (here)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from . import backends as backends
from . import contract as contract
from . import reference as reference
from .autograd import AddDeltaFunction, LinearFunction

_linear = torch.ops.loraxs.linear.default
_linear_unwrapped = torch.ops.loraxs._linear.default
_add_delta = torch.ops.loraxs.add_delta.default
_add_delta_unwrapped = torch.ops.loraxs._add_delta.default
_add_delta_ = torch.ops.loraxs.add_delta_.default

# One look at all devices; asking for the device of x first takes three calls of a path that every token runs through.
_any_autocast_enabled = torch._C._is_any_autocast_enabled


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None = None,
    scale: float = 1.0,
    *,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale · ((drop(x) aᵀ) R_slotᵀ) bᵀ in one op, differentiable in x, bias and pages.

    Args:
        x: [..., K] in fp32, bf16, fp16 or fp64.
        weight, bias: [N, K] and [N] or None; dtype of x; the weight is frozen.
        a, b: [r, K] and [N, r], dtype of x, frozen and shared by all adapters. Fastest when `b.mT` is contiguous.
        pages: [S, r, r], dtype of x or fp32: the R of every slot.
        slots: int32 [M], the slot of every token (M = product of the leading dimensions of x); −1 is the base model;
            None means slot 0 everywhere.
        scale: s, usually alpha / r.
        p_drop: dropout probability on the input of the low-rank path, in [0, 1).
        rng: int64 [2] = (seed, offset) of the mask, on the device of x; needed when p_drop > 0.

    Returns:
        y [..., N] in the dtype of x. Under autocast, x and the frozen tensors are cast first.

    Raises:
        ValueError or RuntimeError: an argument does not fit the contract; the message names it.
    """
    if _any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, weight, bias, a, b = _autocast(x, weight, bias, a, b)
    args = (x, weight, bias, a, b, pages, slots, scale, p_drop, rng)
    if is_compiling():
        return _linear(*args)[0]
    if is_grad_enabled() and (
        pages.requires_grad or x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return LinearFunction.apply(*args)
    return _linear_unwrapped(*args)[0]


def add_delta(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None = None,
    scale: float = 1.0,
    *,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """y + scale · ((drop(x) aᵀ) R_slotᵀ) bᵀ, differentiable in y, x and pages: the adapter over an opaque base layer.

    Args:
        y: [..., N] output of the base layer, in the dtype of x.
        x, a, b, pages, slots, scale, p_drop, rng: as in `linear`.

    Returns:
        a new tensor [..., N] in the dtype of y.
    """
    if _any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        y, x, a, b = _autocast(y, x, a, b)
    args = (y, x, a, b, pages, slots, scale, p_drop, rng)
    if is_compiling():
        return _add_delta(*args)[0]
    if is_grad_enabled() and (pages.requires_grad or x.requires_grad or y.requires_grad):
        return AddDeltaFunction.apply(*args)
    return _add_delta_unwrapped(*args)[0]


def add_delta_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None = None,
    scale: float = 1.0,
    *,
    p_drop: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """`add_delta` written into y, for inference; returns y. Arguments as in `add_delta`, without casts."""
    _add_delta_(y, x, a, b, pages, slots, scale, p_drop, rng)
    return y


def _autocast(*tensors: Any) -> list[Any]:
    """Cast to autocast's dtype as torch does for `F.linear`: everything but fp64. Pages keep their own dtype."""
    device = next(t.device.type for t in tensors if t is not None)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


__all__ = ["add_delta", "add_delta_", "backends", "contract", "linear", "reference"]
