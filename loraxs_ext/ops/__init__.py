"""The ops: what each one means (`reference`), who computes it (`backends`), and how it is called (here)."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from . import backends as backends
from . import contract as contract
from . import reference as reference
from .autograd import AddDeltaFunction, LinearFunction, RowScaleFunction
from .casting import any_autocast_enabled, autocast, wants_autocast
from .prepared import PreparedLayers, prepare
from .rescale import rescale
from .stacked import Site, linear_projected, linear_stack, project

_linear = torch.ops.loraxs.linear.default
_linear_output = torch.ops.loraxs._linear_output.default
_add_delta = torch.ops.loraxs.add_delta.default
_add_delta_unwrapped = torch.ops.loraxs._add_delta.default
_row_scale = torch.ops.loraxs.row_scale.default
_row_scale_unwrapped = torch.ops.loraxs._row_scale.default
_add_delta_ = torch.ops.loraxs.add_delta_.default


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
        pages: [S, r, r], dtype of x or fp32: the R of every slot. A view into the rows of a slab, contiguous within
            each page, is read where it lies.
        slots: int32 [M], the slot of every token (M = product of the leading dimensions of x); −1 is the base model;
            None means slot 0 everywhere.
        scale: s, usually alpha / r.
        p_drop: dropout probability on the input of the low-rank path, in [0, 1).
        rng: int64 [2] = (seed, offset) of the mask, on the device of x; needed when p_drop > 0.

    Returns:
        y [..., N] in the dtype of x. Under autocast, x and the frozen tensors are cast first. A fused owner sums in
        another order than torch's own linear, so a base row equals that one's to rounding.

    Raises:
        ValueError or RuntimeError: an argument does not fit the contract; the message names it.
    """
    if any_autocast_enabled() and wants_autocast(x):
        x, weight, bias, a, b = autocast(x, weight, bias, a, b)
    if not is_grad_enabled() or not (
        pages.requires_grad or x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _linear_output(x, weight, bias, a, b, pages, slots, scale, p_drop, rng)
    args = (x, weight, bias, a, b, pages, slots, scale, p_drop, rng)
    return _linear(*args)[0] if is_compiling() else LinearFunction.apply(*args)


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
    if any_autocast_enabled() and wants_autocast(x):
        y, x, a, b = autocast(y, x, a, b)
    args = (y, x, a, b, pages, slots, scale, p_drop, rng)
    if not is_grad_enabled() or not (pages.requires_grad or x.requires_grad or y.requires_grad):
        return _add_delta_unwrapped(*args)[0]
    return _add_delta(*args)[0] if is_compiling() else AddDeltaFunction.apply(*args)


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


def row_scale(
    rho: Tensor,
    b: Tensor,
    pages: Tensor,
    sigma: Tensor | None,
    m: Tensor,
    scale: float = 1.0,
    *,
    c: Tensor | None = None,
    root: Tensor | None = None,
    through_norm: bool = False,
) -> Tensor:
    """g_i = m_i / ‖w_i + scale · b_i R a‖: the factor that gives row i of the adapted weight the length m_i.

    For adapters with a magnitude (DoRA, Liu et al. 2024; EDoRA, Nasiri and Garraghan 2025): y = g ∘ (x (W + ΔW)ᵀ).
    Neither W nor ΔW is formed or read; of W only its part outside and within the row space of a is cached. The sum of
    squares ρ_i + ‖c_i + scale · b_i R L‖² has no negative term, so nothing cancels.

    Args:
        rho: [N], fp32 (fp64 if b is fp64): squared length of w_i outside the row space of a, best computed in fp64.
        b: [N, r], fp32, bf16, fp16 or fp64, frozen.
        pages: [S, r, r], dtype of b or fp32: the R of every slot.
        sigma: [r] in the dtype of rho. The short form for a converged basis, without c and root: singular values when
            a = Σ Vᵀ and b = U (the reference's placement); None when a = Vᵀ and b = U Σ.
        m: [S, N], dtype of b or fp32: the magnitudes of every slot.
        scale: s, usually alpha / r.
        c, root: [N, r] and [r, r] in the dtype of rho, for any basis, converged or not: from a = L Qᵀ with QᵀQ = 1
            (`torch.linalg.qr(a.mT)` gives Q and Lᵀ), c = W Q and root = L. Both or neither.
        through_norm: False treats the norm as a constant of the backward, as DoRA does: only m receives a gradient.
            True differentiates it too: pages receives its exact gradient.

    Returns:
        g [S, N] in the dtype of m, computed in the dtype of rho; 0 in rows without length.

    Raises:
        ValueError: an argument does not fit the contract, or a frozen one requires a gradient; the message names it.
    """
    args = (rho, b, pages, sigma, m, scale, c, root, through_norm)
    if is_compiling():
        return _row_scale(*args)[0]
    if not is_grad_enabled() or not (m.requires_grad or (through_norm and pages.requires_grad)):
        return _row_scale_unwrapped(*args)[0]
    if through_norm or any(t is not None and t.requires_grad for t in (rho, b, sigma, c, root)):
        return RowScaleFunction.apply(*args)
    # The norm is a constant here: a product of torch, whose backward is not Python, makes a step 14 µs shorter.
    inverse_norm = _row_scale_unwrapped(rho, b, pages.detach(), sigma, m.detach(), scale, c, root)[1]
    return (m * inverse_norm).to(m.dtype)


__all__ = [
    "PreparedLayers",
    "Site",
    "add_delta",
    "add_delta_",
    "backends",
    "contract",
    "linear",
    "linear_projected",
    "linear_stack",
    "prepare",
    "project",
    "reference",
    "rescale",
    "row_scale",
]
