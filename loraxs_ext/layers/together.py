"""Layers called as one op each, or several of them in one: what eager serving calls hundreds of times for every token.

What a layer would look up at every call is found out once, when a batch begins. And on the CPU, layers that read one x
(query, key and value) share a call while tokens are few: whichever is called first computes y for all of them, and the
others take theirs. Which layers these are is known from their calls alone, as in `stacked`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraxs_ext import ops
from loraxs_ext.ops.casting import any_autocast_enabled

from .linear import LoraXSLinear, is_fusable
from .routing import Route, Rows
from .stacked import SHARE_ON_CPU

# With more tokens than this, what a call costs beside its arithmetic no longer counts.
FEW_TOKENS = 32


class _Part(NamedTuple):
    """The arguments of `ops.linear` that stay what they are while a batch is served."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    pages: Tensor
    scale: float


class _Turn(NamedTuple):
    """One x, and y of the layers that have not been called with it yet, by their places in the group."""

    x: Tensor
    version: int
    left: dict[int, Tensor]


def fuse(routes: Mapping[LoraXSLinear, Route]) -> None:
    """Set `Route.fused` wherever all that a layer does under its route is one op.

    Args:
        routes: of layers that serve the same rows, or of one layer.
    """
    parts = {layer: _part_of(layer, route) for layer, route in routes.items()}
    groups: dict[Any, list[LoraXSLinear]] = {}
    for layer, part in parts.items():
        if part is None:
            routes[layer].fused = None
        else:
            together = layer.siblings is not None and not part.weight.is_cuda
            alike = (id(layer.siblings), part.scale, part.bias is None) if together else id(layer)
            groups.setdefault(alike, []).append(layer)
    for layers in groups.values():
        group = _Group(layers, [parts[layer] for layer in layers], routes[layers[0]].rows)
        for place, layer in enumerate(layers):
            routes[layer].fused = partial(group.call, place)


def _part_of(layer: LoraXSLinear, route: Route) -> _Part | None:
    """What `layer` calls `ops.linear` with under `route`; None if it calls anything else."""
    base: Any = layer.base_layer
    if route.pages is None or route.p_drop or type(base) is not nn.Linear or len(layer.loraxs_magnitude):
        return None
    a, b = layer.get_basis(route.adapter)
    with torch.no_grad():
        fits = is_fusable(base, a, a.dtype)
    if not fits or (layer.siblings is not None and (a.is_cuda or SHARE_ON_CPU)):
        return None
    return _Part(base.weight, base.bias, a, b, route.pages, route.scale)


class _Group:
    """Layers that are called as one while that proves right."""

    __slots__ = ("_layers", "_parts", "_rows", "_siblings", "_turn")

    def __init__(self, layers: Sequence[LoraXSLinear], parts: Sequence[_Part], rows: Rows) -> None:
        self._layers, self._parts, self._rows = layers, parts, rows
        columns = [list(column) for column in zip(*(part[:5] for part in parts), strict=True)]
        weight, bias, a, b, pages = columns
        self._siblings = ops.Siblings(weight, [] if bias[0] is None else bias, a, b, pages, parts[0].scale)
        self._turn: _Turn | None = None

    def call(self, place: int, x: Tensor) -> Tensor:
        """y [..., N] of the layer at `place` for x [..., K]."""
        turn = self._turn
        # Nobody but whoever computed this turn had x then, and it was no inference tensor, which has no version.
        if turn is not None and turn.x is x and turn.version == x._version:
            y = turn.left.pop(place, None)
            if not turn.left:
                self._turn = None
            if y is not None:
                return y
        return self._begin(place, x)

    def _begin(self, place: int, x: Tensor) -> Tensor:
        layer, turn = self._layers[place], self._turn
        self._turn = None
        if torch.is_grad_enabled():
            # The weight may be trained by now.
            return layer.run(x, layer.paths(x), (), {})
        if turn is not None and turn.left:
            self._split([self._layers[other] for other in turn.left])
            return layer.forward(x)
        slots = self._rows.per_token(x)
        alone = len(self._layers) == 1 or x.numel() > FEW_TOKENS * x.shape[-1]
        if alone or x.is_inference() or any_autocast_enabled():
            part = self._parts[place]
            return ops.linear(x, part.weight, part.bias, part.a, part.b, part.pages, slots, part.scale)
        left = dict(enumerate(ops.linear_siblings(x, self._siblings, slots)))
        y = left.pop(place)
        self._turn = _Turn(x, x._version, left)
        return y

    def _split(self, leaving: Sequence[LoraXSLinear]) -> None:
        """Layers that were not called with the x of the others are no siblings of theirs, now and later."""
        siblings = leaving[0].siblings
        if siblings is not None:
            siblings.dismiss(leaving)
        fuse({layer: layer.route for layer in self._layers if layer.route is not None})
