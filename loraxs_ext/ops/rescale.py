"""y = g ∘ z + bias: the last step of a layer whose adapter has a magnitude (DoRA, EDoRA), in one pass over z."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import differentiable
from .casting import any_autocast_enabled, autocast, wants_autocast

_RESCALE = torch.ops.loraxs.rescale.default
_UNWRAPPED = torch.ops.loraxs._rescale.default
_BACKWARD = torch.ops.loraxs.rescale_backward.default


def rescale(z: Tensor, g: Tensor, slots: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """y_m = g_slot(m) ∘ z_m + bias, differentiable in z, g and bias.

    Args:
        z: [..., N] in fp32, bf16, fp16 or fp64.
        g: [S, N], dtype of z or fp32: the factors of every slot, from `row_scale`.
        slots: int32 [M], the slot of every token (M = product of the leading dimensions of z); −1 leaves the token's z
            as it is; None means slot 0 everywhere.
        bias: [N] in the dtype of z, or None. It is not scaled.

    Returns:
        y [..., N] in the dtype of z. Under autocast, z and bias are cast first.

    Raises:
        ValueError or RuntimeError: an argument does not fit the contract; the message names it.
    """
    if any_autocast_enabled() and wants_autocast(z):
        z, bias = autocast(z, bias)
    args = (z, g, slots, bias)
    if not torch.is_grad_enabled() or not (
        z.requires_grad or g.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _UNWRAPPED(*args)
    return _RESCALE(*args) if torch.compiler.is_compiling() else RescaleFunction.apply(*args)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, g, slots, _bias = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(z if needs[1] else None, g if needs[0] or needs[1] else None, slots)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None) -> tuple:
    need_dz, need_dg, _, need_dbias = ctx.needs_input_grad
    if dy is None:
        return None, None, None, None
    dz = dg = None
    if need_dz or need_dg:
        z, g, slots = ctx.saved_tensors
        dz, dg = _BACKWARD(dy, z, g, slots, need_dz)
    dbias = dy.sum(dim=tuple(range(dy.dim() - 1))) if need_dbias else None
    return dz if need_dz else None, dg if need_dg else None, None, dbias


RescaleFunction = differentiable("rescale", _setup, _backward)
