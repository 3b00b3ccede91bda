"""Layers called as one op each, or several of them in one: what eager serving calls hundreds of times for every token.

What a layer would look up at every call is found out once, when a batch begins. And on the CPU, layers that read one x
(query, key and value) share a call while tokens are few: whichever is called first computes y for all of them, and the
others take theirs. Which layers these are is known from their calls alone, as in `stacked`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch.jit import is_tracing

from loraxs_ext import ops

from .linear import LoraXSLinear, is_fusable
from .routing import Route, Rows
from .stacked import SHARE_ON_CPU

# With more tokens than this, what a call costs beside its arithmetic no longer counts.
FEW_TOKENS = 32


class _Turn(NamedTuple):
    """One x, and y of the layers by their places in the group, None where it was taken."""

    x: Tensor
    version: int
    ys: list[Tensor | None]


# Prepared calls by the addresses they are for, which they keep from being used for anything else.
Known = dict[tuple[Any, ...], ops.PreparedLayers | None]


def fuse(routes: Mapping[LoraXSLinear, Route], known: Known | None = None) -> None:
    """Set `Route.fused` wherever all that a layer does under its route is one op.

    Args:
        routes: of layers that serve the same rows, or of one layer.
        known: what was prepared for the batch before; afterwards, for this one.
    """
    groups: dict[Any, dict[LoraXSLinear, ops.Site]] = {}
    with torch.no_grad():
        found = [(layer, route, _site_of(layer, route)) for layer, route in routes.items()]
    for layer, route, site in found:
        if site is None:
            route.fused = None
        else:
            alone = layer.siblings is None or site.weight.is_cuda
            groups.setdefault(layer if alone else layer.siblings, {})[layer] = site
    before = known or {}
    after: Known = {}
    for sites in groups.values():
        addresses = tuple(map(_addresses, sites.values()))
        after[addresses] = before[addresses] if addresses in before else ops.prepare(list(sites.values()))
        group = _Group(list(sites), list(sites.values()), after[addresses], routes[next(iter(sites))].rows)
        for place, layer in enumerate(sites):
            routes[layer].fused = partial(group.call, place)
    if known is not None:
        known.clear()
        known.update(after)


def _addresses(site: ops.Site) -> tuple[Any, ...]:
    """Where the numbers of a site lie, and how."""
    tensors = (site.weight, site.a, site.b, site.pages, *(() if site.bias is None else (site.bias,)))
    return site.scale, site.pages.stride(0), *((t.data_ptr(), t.dtype, t.shape) for t in tensors)


def _site_of(layer: LoraXSLinear, route: Route) -> ops.Site | None:
    """What `layer` calls `ops.linear` with under `route`; None if it calls anything else."""
    base: Any = layer.base_layer
    if route.pages is None or route.p_drop or type(base) is not nn.Linear or len(layer.loraxs_magnitude):
        return None
    a, b = layer.get_basis(route.adapter)
    if not is_fusable(base, a, a.dtype) or (layer.siblings is not None and (a.is_cuda or SHARE_ON_CPU)):
        return None
    return ops.Site(base.weight, base.bias, a, b, route.pages, scale=route.scale)


class _Group:
    """One layer, or several that are called as one while that proves right."""

    __slots__ = ("_layers", "_prepared", "_rows", "_sites", "_turn")

    def __init__(
        self,
        layers: Sequence[LoraXSLinear],
        sites: Sequence[ops.Site],
        prepared: ops.PreparedLayers | None,
        rows: Rows,
    ) -> None:
        self._layers, self._sites, self._prepared, self._rows = layers, sites, prepared, rows
        self._turn: _Turn | None = None

    def call(self, place: int, x: Tensor) -> Tensor:
        """y [..., N] of the layer at `place` for x [..., K]."""
        turn = self._turn
        # It was no inference tensor, which has no version.
        if turn is not None and turn[0] is x and turn[1] == x._version:
            ys = turn[2]
            y, ys[place] = ys[place], None
            if y is not None:
                return y
        return self._begin(place, x)

    def _begin(self, place: int, x: Tensor) -> Tensor:
        if is_grad_enabled() or is_autocast_enabled("cpu") or is_tracing():
            # The weight may be trained by now, x may be cast, or somebody wants to see ops.
            layer = self._layers[place]
            return layer.run(x, layer.paths(x), (), {})
        prepared, alone = self._prepared, len(self._layers) == 1
        if not alone and self._turn is not None:
            turn, self._turn = self._turn, None
            left = [layer for layer, y in zip(self._layers, turn.ys, strict=True) if y is not None]
            if left:
                self._split(left)
                return self._layers[place](x)
        slots = self._rows.per_token(x)
        if prepared is not None and (alone or (slots.shape[0] <= FEW_TOKENS and not x.is_inference())):
            ys: list[Any] = prepared(x, slots)
            if ys:
                y = ys[place]
                if not alone:
                    ys[place] = None
                    self._turn = _Turn(x, x._version, ys)
                return y
        weight, bias, a, b, pages, _, scale = self._sites[place]
        return ops.linear(x, weight, bias, a, b, pages, slots, scale)

    def _split(self, leaving: Sequence[LoraXSLinear]) -> None:
        """Layers that were not called with the x of the others are no siblings of theirs, now and later."""
        siblings = leaving[0].siblings
        if siblings is not None:
            siblings.dismiss(leaving)
        routes = {layer: layer.route for layer in self._layers if layer.route is not None}
        fuse(routes)
        for layer, route in routes.items():
            layer.fused = route.fused
