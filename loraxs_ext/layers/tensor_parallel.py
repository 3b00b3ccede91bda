"""The low-rank path over a weight of which every process has a part: tensor parallelism.

A and B are complete on every process and R is the same, so the path needs the columns of A or the rows of B that belong
to the part, and one sum over processes of something of width r:

    rows of W (column-wise):     y_part = x W_partᵀ + s·(p Rᵀ) B_partᵀ,  p = x Aᵀ;  backward sums dp and dR
    columns of W (row-wise):     y = Σ x_part W_partᵀ + s·(p Rᵀ) Bᵀ,  p = Σ x_part A_partᵀ

Either way the gradient of R that a process ends up with is complete, and has the same bits as everywhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loraxs_ext import ops

from .path import LowRankPath, draw_rng
from .sharding import is_sharded


class Part(NamedTuple):
    """The rows or columns of W that this process has.

    Attributes:
        group: the processes that have the others.
        start, stop: first one, and the one after the last.
        of_rows: rows of W, hence of B; else its columns, hence those of A.
    """

    group: dist.ProcessGroup
    start: int
    stop: int
    of_rows: bool


def find_part(base: nn.Module, key: str, x: Tensor, y: Tensor, shape: tuple[int, int]) -> Part | None:
    """What this process computed when `base` turned x into y; None if that was everything.

    Args:
        base: the base layer, with the weight it computed with.
        key: its name, for messages.
        x: [..., K], or its columns that belong to columns of W.
        y: [..., N], or its columns that belong to rows of W.
        shape: (N, K) of W.

    Raises:
        TypeError: x or y is a DTensor, or W is divided in another way than by consecutive rows or columns.
    """
    if is_sharded(x) or is_sharded(y):
        raise TypeError(
            f"{key}: base_layer: expected tensor parallelism with local inputs and outputs, got a DTensor; use "
            f"use_local_output=True"
        )
    cut = (y.shape[-1] != shape[0], x.shape[-1] != shape[1])
    if cut == (False, False):
        return None
    weight: Any = base._parameters.get("weight")
    dim = 0 if cut[0] else 1
    places = [i for i, place in enumerate(weight.placements) if place.is_shard(dim)] if is_sharded(weight) else []
    if all(cut) or len(places) != 1 or type(weight.placements[places[0]]).__name__ != "Shard":
        how = weight.placements if is_sharded(weight) else type(weight).__name__
        raise TypeError(
            f"{key}: base_layer: expected a weight of which every process has consecutive rows or columns, as "
            f"colwise and rowwise tensor parallelism divide it, got {how} with x [..., {x.shape[-1]}] and "
            f"y [..., {y.shape[-1]}] for W {list(shape)}; name the layer in exclude_modules"
        )
    mesh = weight.device_mesh
    (place,) = places
    length = -(-shape[dim] // mesh.size(place))
    start = min(mesh.get_local_rank(place) * length, shape[dim])
    return Part(mesh.get_group(place), start, min(start + length, shape[dim]), cut[0])


def add_partial_path(y: Tensor, x: Tensor, path: LowRankPath, part: Part) -> Tensor:
    """`add_path` where this process has a part of W only.

    Args:
        y: [..., N], or its columns `part`.
        x: [..., K], or its columns `part`.
        path: complete.
        part: from `find_part`.
    """
    a, b, pages, slots, scale, p_drop = path
    x = x.to(a.dtype)
    if not part.of_rows:
        a = a[:, part.start : part.stop]
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    # The op that drops out and projects: p = (drop(x) aᵀ) 1ᵀ 1ᵀ.
    p = ops.add_delta(
        x.new_zeros(*x.shape[:-1], len(a)), x, a, identity, identity.unsqueeze(0),
        p_drop=p_drop, rng=_rng(x, part) if p_drop else None,
    )  # fmt: skip
    if part.of_rows:
        p, pages, b = sum_gradient(p, part.group), sum_gradient(pages, part.group), b[part.start : part.stop]
    else:
        p = _Sum.apply(p, part.group)
    return ops.add_delta(y.to(a.dtype), p, identity, b, pages, slots, scale).to(y.dtype)


def own_columns(factors: Tensor, part: Part | None) -> Tensor:
    """The columns of `factors` [..., N] that belong to `part`, each process adding to their gradient."""
    if part is None or not part.of_rows:
        return factors
    return sum_gradient(factors, part.group)[..., part.start : part.stop]


def local_bias(bias: Any, y: Tensor) -> Tensor:
    """The bias of the columns of y [..., N] that this process has."""
    if not is_sharded(bias):
        return bias
    local = bias.to_local()
    return local if len(local) == y.shape[-1] else bias.full_tensor()


def sum_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which every process has, with the sum of what the processes' parts contribute to its gradient."""
    return _SumGradient.apply(x, group) if x.requires_grad and torch.is_grad_enabled() else x


def _rng(x: Tensor, part: Part) -> Tensor:
    rng = agreed_rng(x, part.group)
    # Other columns of x are other entries.
    return rng if part.of_rows else rng + dist.get_rank(part.group)


def agreed_rng(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(seed, offset) of a dropout mask that all processes of `group` use for the x they have in common."""
    rng = draw_rng(x)
    dist.broadcast(rng, dist.get_global_rank(group, 0), group=group)
    return rng


def mesh_group(weight: Any) -> dist.ProcessGroup:
    """The processes that share `weight`, a DTensor that is divided along one dimension of its mesh."""
    places = [i for i, place in enumerate(weight.placements) if not place.is_replicate()]
    return weight.device_mesh.get_group(places[0] if places else 0)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    accurate = torch.promote_types(x.dtype, torch.float32)
    total = x.detach().to(accurate, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


class _Sum(torch.autograd.Function):
    """Σ x over the processes; what becomes of the sum is the same on all of them, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None
