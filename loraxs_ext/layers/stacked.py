"""Sibling layers that read one x share one projection of it, computed by whichever of them is called first.

Nothing but the calls themselves tells which layers read the same x, so siblings of equal width start as one group, and
one that is called with another x leaves it: the output projection of an attention at its first call, for instance.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from loraxs_ext import ops

if TYPE_CHECKING:
    from .layer import LoraXSLayer

# On a CUDA device every layer streams x from memory for its own p; of three layers, two of those reads can be saved
# (model: 4 % of query, key and value at 4096 tokens of width 4096; not measured). On the CPU p comes from the same
# fused call as y, while x lies in the cache: there is nothing to save, and asking would cost every call.
SHARE_ON_CPU = False
# Up to here one kernel streams the weight and finds p on the way; a projection of its own would only add launches.
ALONE_TOKENS = 128


class _Turn(NamedTuple):
    """One x, and the shares of its projection that were not taken yet, each with the basis it was projected on."""

    x: weakref.ref[Tensor]
    moment: tuple[Any, ...]
    shares: dict[weakref.ref[LoraXSLayer], tuple[Tensor, Tensor]]


class SharedProjection:
    """The layers of one group. Holds neither them nor x alive, and of p only what a called layer has not taken yet.

    Args:
        layers: siblings of equal `in_features`.
    """

    def __init__(self, layers: Iterable[LoraXSLayer]) -> None:
        self._members = [weakref.ref(layer) for layer in layers]
        self._turn: _Turn | None = None
        self._bases: list[Tensor] = []
        self._stacks: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled layer has other siblings: it starts alone.
        return type(None), ()

    def take(self, layer: LoraXSLayer, x: Tensor, a: Tensor) -> Tensor | None:
        """p = x aᵀ [M, r] for `layer`, or None where it has to project by itself.

        Args:
            x: [..., K], what the layer was called with.
            a: [r, K], the first rows of the basis of `layer`.
        """
        if type(x) is not Tensor or x.is_inference() or x.numel() <= ALONE_TOKENS * x.shape[-1]:
            return None
        me, turn, moment = weakref.ref(layer), self._turn, _moment(x)
        if me not in self._members:
            return None  # A replica of a member, on another device.
        if turn is not None and turn.x() is x and turn.moment == moment:
            share = turn.shares.pop(me, None)
            if not turn.shares:
                self._turn = None
            return _rows_for(share, a)
        self._turn = None
        if turn is not None and turn.shares:
            left = self._split(list(turn.shares))
            if me in turn.shares:
                return None if left is None else left.take(layer, x, a)
        shares = self._project(x, a.shape[0])
        own = shares.pop(me, None)
        if shares:
            self._turn = _Turn(weakref.ref(x), moment, shares)
        return _rows_for(own, a)

    def dismiss(self, layers: Iterable[LoraXSLayer]) -> None:
        """Take members out that are called with another x than the rest; they become a group of their own."""
        self._split([weakref.ref(layer) for layer in layers])

    def _split(self, leaving: Sequence[weakref.ref[LoraXSLayer]]) -> SharedProjection | None:
        """Members that were not called with the x of the others become a group of their own."""
        self._members = [member for member in self._members if member not in leaving]
        layers = [layer for layer in (member() for member in leaving) if layer is not None]
        group = SharedProjection(layers) if len(layers) > 1 else None
        for layer in layers:
            layer.siblings = group
        return group

    def _project(self, x: Tensor, r: int) -> dict[weakref.ref[LoraXSLayer], tuple[Tensor, Tensor]]:
        """Shares of rank r, or less where a basis has less, of all members; none if there is nobody to share with."""
        layers = [(member, member()) for member in self._members]
        bases = {member: layer._buffers["loraxs_A"] for member, layer in layers if layer is not None}
        fitting = {m: basis for m, basis in bases.items() if basis is not None and basis.device == x.device}
        if len(fitting) < 2 or len({basis.dtype for basis in fitting.values()}) > 1:
            return {}
        stack = self._stack(list(fitting.values()), r)
        if stack is None:
            return {}
        shares = ops.project(x, stack).split([min(r, basis.shape[0]) for basis in fitting.values()], dim=1)
        return {member: (p, basis) for (member, basis), p in zip(fitting.items(), shares, strict=True)}

    def _stack(self, bases: list[Tensor], r: int) -> Tensor | None:
        """The first r rows of all bases, one below the other, kept until one is replaced; None if it can't be made."""
        if len(bases) != len(self._bases) or any(b is not s for b, s in zip(bases, self._bases, strict=True)):
            self._bases, self._stacks = bases, {}
        if r not in self._stacks:
            if bases[0].is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # What a capture writes is only there after a replay.
            self._stacks[r] = torch.cat([basis[:r] for basis in bases])
            if bases[0].is_cuda:
                # Once per model and rank: later calls may come on any stream.
                torch.cuda.current_stream(bases[0].device).synchronize()
        return self._stacks[r]


def share_projections(model: nn.Module) -> None:
    """Group the LoRA-XS layers of `model` that have one parent and equal `in_features`."""
    from .layer import LoraXSLayer

    for parent in model.modules():
        groups: dict[int, list[LoraXSLayer]] = {}
        for child in parent.children():
            if isinstance(child, LoraXSLayer) and child.shares_projection:
                groups.setdefault(child.in_features, []).append(child)
        for layers in groups.values():
            group = SharedProjection(layers) if len(layers) > 1 else None
            for layer in layers:
                layer.siblings = group


def _moment(x: Tensor) -> tuple[Any, ...]:
    """What must not change between the first call with x and the next, or p is not theirs to share."""
    kind = x.device.type
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return threading.get_ident(), x._version, stream, cast


def _rows_for(share: tuple[Tensor, Tensor] | None, a: Tensor) -> Tensor | None:
    """The columns of a share that belong to a, if that is a beginning of the basis the share was projected on."""
    if share is None:
        return None
    p, basis = share
    if a.data_ptr() != basis.data_ptr() or a.shape[0] > p.shape[1]:
        return None
    return p[:, : a.shape[0]]
