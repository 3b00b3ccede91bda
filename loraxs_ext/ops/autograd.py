"""Backward formulas. One set-up and one backward per op serve both ways an op is differentiated.

`torch.library.register_autograd` makes `torch.ops.loraxs.*` differentiable for torch.compile and for direct calls.
Eager training goes through an `autograd.Function` around the same two functions, because the registered route costs
about twice as much per call (CPU, one core: 34 µs against 17 µs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .contract import LIBRARY

_BACKWARD = torch.ops.loraxs.linear_backward.default


def _refuse_frozen(op: str, needs_grad: tuple[bool, ...], **positions: int) -> None:
    for name, index in positions.items():
        # The dispatcher drops trailing arguments that have their default values.
        if index < len(needs_grad) and needs_grad[index]:
            raise ValueError(
                f"loraxs::{op}: {name}: expected a frozen tensor (requires_grad=False), got requires_grad=True; "
                f"no gradient is computed for it"
            )


def _linear_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _x, weight, _bias, a, b, pages, slots, scale, p_drop, rng = inputs
    _refuse_frozen("linear", ctx.needs_input_grad, weight=1, a=3, b=4)
    _save(ctx, weight, a, b, pages, slots, output[1], rng, scale, p_drop)


def _linear_backward(ctx: Any, dy: Tensor | None, _dp: Tensor | None = None) -> tuple:
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * 10
    dx, dpages = _run_backward(ctx, dy, needs[0], needs[5])
    dbias = dy.sum(dim=tuple(range(dy.dim() - 1))) if needs[2] else None
    return dx, None, dbias, None, None, dpages, None, None, None, None


def _add_delta_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _y, _x, a, b, pages, slots, scale, p_drop, rng = inputs
    _refuse_frozen("add_delta", ctx.needs_input_grad, a=2, b=3)
    _save(ctx, None, a, b, pages, slots, output[1], rng, scale, p_drop)


def _add_delta_backward(ctx: Any, dy: Tensor | None, _dp: Tensor | None = None) -> tuple:
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * 9
    dx, dpages = _run_backward(ctx, dy, needs[1], needs[4])
    return dy if needs[0] else None, dx, None, None, dpages, None, None, None, None


def _save(ctx: Any, weight, a, b, pages, slots, p, rng, scale: float, p_drop: float) -> None:
    ctx.save_for_backward(weight, a, b, pages, slots, p, rng)
    ctx.scale, ctx.p_drop = scale, p_drop
    # p is an output so that it can be saved, not so that it can be differentiated: its gradient is never read.
    ctx.set_materialize_grads(False)


def _run_backward(ctx: Any, dy: Tensor, need_dx: bool, need_dpages: bool) -> tuple[Tensor | None, Tensor | None]:
    if not (need_dx or need_dpages):
        return None, None
    weight, a, b, pages, slots, p, rng = ctx.saved_tensors
    dx, dpages = _BACKWARD(
        dy, weight, a, b, pages, slots, p, ctx.scale, ctx.p_drop, rng, need_dx, need_dpages
    )  # fmt: skip
    return dx if need_dx else None, dpages if need_dpages else None


def _row_scale_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    rho, b, pages, sigma, m, scale, c, root, through_norm = inputs
    _refuse_frozen("row_scale", ctx.needs_input_grad, rho=0, b=1, sigma=3, c=6, root=7)
    # Without the norm's own gradient, all that g = m / norm needs is 1 / norm.
    ctx.through_norm = through_norm and ctx.needs_input_grad[2]
    ctx.save_for_backward(output[1], *((b, pages, sigma, m, c, root) if ctx.through_norm else ()))
    ctx.scale, ctx.dtype = scale, m.dtype
    ctx.set_materialize_grads(False)


def _row_scale_backward(ctx: Any, dg: Tensor | None, _dinverse: Tensor | None = None) -> tuple:
    if dg is None:
        return (None,) * 9
    inverse_norm, *frozen = ctx.saved_tensors
    dpages = None
    if ctx.through_norm:
        b, pages, sigma, m, c, root = frozen
        dpages = reference.row_scale_backward(dg, inverse_norm, b, pages, sigma, m, ctx.scale, c, root)
    dm = (dg * inverse_norm).to(ctx.dtype) if ctx.needs_input_grad[4] else None
    return None, None, dpages, None, dm, None, None, None, None


def differentiable(
    op: str, setup: Callable[..., None], backward: Callable[..., tuple]
) -> type[torch.autograd.Function]:
    """Register the backward of an op.

    Args:
        op: its name; with an underscore before it, that of the same without a derivative.
        setup, backward: as `register_autograd` takes them.

    Returns:
        The first output of the op for eager training, with the arguments of the op.
    """
    torch.library.register_autograd(f"loraxs::{op}", backward, setup_context=setup, lib=LIBRARY)
    compute = getattr(torch.ops.loraxs, f"_{op}").default

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = compute(*inputs)
        setup(ctx, inputs, output)
        return output[0] if isinstance(output, tuple) else output

    def backward_once(ctx: Any, *grads: Tensor | None) -> tuple:
        _refuse_twice(op)
        return backward(ctx, *grads)

    # Profiles call the backward by the name of the class.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
    return type(f"loraxs_{op}", (torch.autograd.Function,), members)


LinearFunction = differentiable("linear", _linear_setup, _linear_backward)
AddDeltaFunction = differentiable("add_delta", _add_delta_setup, _add_delta_backward)
RowScaleFunction = differentiable("row_scale", _row_scale_setup, _row_scale_backward)


def _refuse_twice(op: str) -> None:
    """Gradients are recorded inside a backward pass only under create_graph=True; ours have no derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"loraxs::{op}: differentiating twice (create_graph=True) is not supported")
