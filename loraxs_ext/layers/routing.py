"""Which adapter serves which row of a batch, and the table of R matrices the rows choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .edora import route_scales

if TYPE_CHECKING:
    from .layer import LoraXSLayer

BASE = "__base__"


class Rows:
    """Which slot serves which row of a batch; one object may serve all layers.

    Args:
        slots: int32 [rows] or [tokens]; −1 is the base model.
        exact: refuse x of more rows than `slots`. generate() has more, for beams and returned sequences.
    """

    def __init__(self, slots: Tensor, exact: bool = False) -> None:
        self.slots, self.exact = slots, exact
        # What a decoder would make anew for hundreds of layers at every step, with what it was made of.
        self._expanded: tuple[Tensor, int, int, Tensor] | None = None

    def per_token(self, x: Tensor) -> Tensor:
        """int32 [M], the slot of every token of x [..., K].

        Token m belongs to row m // (M / rows). That covers [rows, T, K] and [rows, K], and it needs no word about
        beams or several returned sequences: generate() repeats every row in place, inside the decoder only.

        Raises:
            ValueError: the first dimension of x is no multiple of the rows, and the tokens are not as many as the rows.
        """
        tokens = x.numel() // x.shape[-1]
        rows = self.slots.shape[0]
        if tokens == rows:
            return self.slots
        if x.shape[0] % rows or (self.exact and x.ndim > 2 and x.shape[0] != rows):
            raise ValueError(
                f"adapters: expected one name per row of the batch, or one slot per token, got {rows} for an input of "
                f"shape {list(x.shape)}"
            )
        return self._expand(tokens // rows)

    def _expand(self, times: int) -> Tensor:
        """Every slot `times` times in a row."""
        slots = self.slots
        # A CUDA graph has to expand what it finds when it is replayed; inference tensors do not tell when they change.
        if is_compiling() or slots.is_cuda or slots.is_inference():
            return slots.repeat_interleave(times)
        kept = self._expanded
        if kept is None or kept[0] is not slots or kept[1:3] != (slots._version, times):
            self._expanded = kept = slots, slots._version, times, slots.repeat_interleave(times)
        return kept[3]


@dataclass
class Route:
    """What one layer needs to serve a mixed batch; a plain object on the layer, which torch.compile can guard.

    Attributes:
        rows: the slots of the rows of a batch, on the layer's device.
        pages: [S, r, r], smaller ranks padded with zeros; None when every row is a base row.
        adapter: the adapter of the largest rank, whose basis contains the bases of all others.
        scales: [S, N], the factors of the rows of W where an adapter has a magnitude; None where none has one.
        scale: s of all pages; 1 where every page has its own scaling folded in.
        p_drop: dropout probability on the input of the low-rank path, for training.
        fused: what the layer then calls in eager mode (see `together`); None to look at everything at every call.
        names: adapters of the layer that this route, or one it stands before, needs as long as it is followed.
    """

    rows: Rows
    pages: Tensor | None
    adapter: str
    scales: Tensor | None = None
    scale: float = 1.0
    p_drop: float = 0.0
    fused: Callable[[Tensor], Tensor] | None = None
    names: frozenset[str] = frozenset()
    # Kept with what it was made of.
    _basis: tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def basis_of(self, layer: LoraXSLayer) -> tuple[Tensor, Tensor]:
        """a [r, K] and b [N, r] of the adapter in `layer`, whose route this is."""
        if is_compiling():
            return layer.get_basis(self.adapter)
        a, bt, kept = layer._buffers["loraxs_A"], layer._buffers["loraxs_Bt"], self._basis
        if kept is None or kept[0] is not a or kept[1] is not bt:
            self._basis = kept = a, bt, layer.get_basis(self.adapter)
        return kept[2]


def build_route(layer: LoraXSLayer, names: Sequence[str]) -> Route:
    """The route of `layer` for a batch whose row i is served by the adapter names[i] (`__base__`: by none)."""
    present = [name for name in dict.fromkeys(names) if name in layer.loraxs_R]
    slot_of = {name: slot for slot, name in enumerate(present)}
    device = layer.get_base_layer_device()
    slots = torch.tensor([slot_of.get(name, -1) for name in names], dtype=torch.int32, device=device)
    outer = frozenset() if layer.route is None else layer.route.names
    if not present:
        return Route(Rows(slots), None, BASE, names=outer)
    widest = max(present, key=layer.r.__getitem__)
    rank = layer.r[widest]
    pages = torch.stack([pad(layer.get_R(name) * layer.scaling[name], rank) for name in present])
    return Route(Rows(slots), pages, widest, route_scales(layer, present), names=outer.union(present))


@contextmanager
def routed(layers: Iterable[LoraXSLayer], names: Sequence[str]) -> Iterator[None]:
    """Serve every forward pass inside the context with the adapter names[i] for row i.

    Args:
        layers: the layers of the model.
        names: one adapter name per row of the batch; `__base__` for the plain model.

    Raises:
        ValueError: a layer is merged.
    """
    layers = list(layers)
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    for layer in layers:
        for name in dict.fromkeys(names):
            layer.settle(name)
    with following({layer: build_route(layer, names) for layer in layers}):
        yield


@contextmanager
def following(routes: Mapping[LoraXSLayer, Route]) -> Iterator[None]:
    """Every forward pass inside the context takes these routes; layers without one keep theirs."""
    before = {layer: (layer.route, layer.fused) for layer in routes}
    try:
        for layer, route in routes.items():
            _set(layer, route, None if layer.disable_adapters else route.fused)
        yield
    finally:
        for layer, old in before.items():
            _set(layer, *old)


def _set(layer: LoraXSLayer, route: Route | None, fused: Callable[[Tensor], Tensor] | None) -> None:
    """Past `nn.Module.__setattr__`, which looks for parameters and modules first, in hundreds of layers a batch."""
    vars(layer).update(route=route, fused=fused)


def pad(core: Tensor, rank: int) -> Tensor:
    """R [..., r, r] padded with zeros to [..., rank, rank]; exact, because bases are nested."""
    missing = rank - core.shape[-1]
    return F.pad(core, (0, missing, 0, missing)) if missing else core
