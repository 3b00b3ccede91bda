"""Layers that read one x share one projection: p = x [a₁; a₂; …]ᵀ is computed once, and every layer takes its columns.

Query, key and value read the same activations, and so do the gate and up projections of an MLP. Separately each of
them streams x once more for its p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import _refuse_frozen, _run_backward, _save, differentiable
from .casting import autocast, wants_autocast

_PROJECT = torch.ops.loraxs.project.default
_LINEAR_PROJECTED = torch.ops.loraxs.linear_projected.default
_UNWRAPPED = torch.ops.loraxs._linear_projected.default


class Site(NamedTuple):
    """One layer of a stack, with the arguments of `ops.linear`."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    pages: Tensor
    slots: Tensor | None = None
    scale: float = 1.0


def linear_stack(x: Tensor, a: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """[ops.linear(x, *site) for site in sites] with one projection of x for all of them; differentiable alike.

    Args:
        x: [..., K]; there is no dropout here, because every layer would drop other entries.
        a: [Σ r, K], the bases of the sites one below the other; best kept, with the sites' own `a` as views of it.
        sites: at least one.

    Raises:
        ValueError: the ranks of the sites do not add up to the rows of `a`.
    """
    ranks = [site.a.shape[0] for site in sites]
    if sum(ranks) != a.shape[0]:
        raise ValueError(f"linear_stack: a: expected {sum(ranks)} rows for ranks {ranks}, got {a.shape[0]}")
    shares = project(x, a).split(ranks, dim=1)
    return [linear_projected(x, site.weight, site.bias, p, *site[2:]) for p, site in zip(shares, sites, strict=True)]


def project(x: Tensor, a: Tensor) -> Tensor:
    """p = x aᵀ [M, r] in the accumulation dtype; never differentiated, as `linear_projected` does that for both.

    Args:
        x: [..., K].
        a: [r, K], dtype of x.
    """
    if wants_autocast(x):
        x, a = autocast(x, a)
    with torch.no_grad():
        return _PROJECT(x, a)


def linear_projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: Tensor,
    a: Tensor,
    b: Tensor,
    pages: Tensor,
    slots: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`ops.linear` without dropout for a p = `project(x, a)` that is known; differentiable in x, bias and pages.

    The gradient of x includes that through p.

    Args:
        p: [M, r] in the accumulation dtype, without a graph, of any strides.
        x, weight, bias, a, b, pages, slots, scale: as in `ops.linear`.
    """
    if wants_autocast(x):
        x, weight, bias, a, b = autocast(x, weight, bias, a, b)
    args = (x, weight, bias, p, a, b, pages, slots, scale)
    if torch.compiler.is_compiling():
        return _LINEAR_PROJECTED(*args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, a, b, pages)):
        return LinearProjectedFunction.apply(*args)
    return _UNWRAPPED(*args)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _x, weight, _bias, p, a, b, pages, slots, scale = inputs
    _refuse_frozen("linear_projected", ctx.needs_input_grad, weight=1, p=3, a=4, b=5)
    _save(ctx, weight, a, b, pages, slots, p, None, scale, 0.0)


def _backward(ctx: Any, dy: Tensor | None) -> tuple:
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * 9
    dx, dpages = _run_backward(ctx, dy, needs[0], needs[6])
    dbias = dy.sum(dim=tuple(range(dy.dim() - 1))) if needs[2] else None
    return dx, None, dbias, None, None, None, dpages, None, None


LinearProjectedFunction = differentiable("linear_projected", _setup, _backward)
