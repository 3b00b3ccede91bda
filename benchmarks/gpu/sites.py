"""Providers of more than one op: EDoRA's row scale on top of LoRA-XS, and projections of one x stacked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.data import SCALE, Inputs, Layer, make_layer
from benchmarks.gpu.limits import Work
from benchmarks.gpu.providers import Base, Factory, LoraXS
from loraxs_ext import ops
from loraxs_ext.ops.stacked import Site, linear_stack

# Query, key and value.
SITES = 3


class RowScaled(LoraXS):
    """LoRA-XS and the factors g that EDoRA multiplies the rows of the weight by; g is not applied."""

    def __init__(self, cell: Cell, layer: Layer, inputs: Inputs) -> None:
        super().__init__(cell, layer, inputs)
        weight, a = layer.weight.double(), layer.a.double()
        Q, L = torch.linalg.qr(a.mT)
        c = weight @ Q
        self.rho = (weight - c @ Q.mT).square().sum(1).float()
        self.c, self.root = c.float(), L.mT.float().contiguous()
        self.m = torch.rand(cell.adapters, cell.N, device=weight.device) + 0.5

    def __call__(self) -> tuple[Tensor, ...]:
        return self._forward(), self._row_scale()

    def _row_scale(self) -> Tensor:
        layer = self.layer
        return ops.row_scale(self.rho, layer.b, layer.pages, None, self.m, SCALE, c=self.c, root=self.root)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        (y,) = super().plain(dtype)
        # The truth is the norm of the adapted weight itself; no half type could hold its square sum.
        wide = torch.promote_types(dtype, torch.float32)
        layer = self.layer.to(wide)
        lengths = [(layer.weight + SCALE * layer.b @ R @ layer.a).square().sum(1).sqrt() for R in layer.pages]
        return y, self.m.to(wide) / torch.stack(lengths)


class Scaled(RowScaled):
    """The same with y multiplied by the factors of its adapter, as a pass of its own."""

    def __call__(self) -> tuple[Tensor, ...]:
        return (self._forward() * self._factors(self._row_scale()).to(self.x.dtype),)

    def _factors(self, g: Tensor) -> Tensor:
        return g[0] if self.inputs.slots is None else g[self.inputs.slots.long()]

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        y, g = super().plain(dtype)
        return (y * self._factors(g).to(dtype),)


class _Sites:
    """Three layers that read one x."""

    provider: type[Base] | type[LoraXS]

    def __init__(self, cell: Cell, layer: Layer, inputs: Inputs) -> None:
        self.layers = [layer, *(make_layer(cell, layer.weight.device) for _ in range(SITES - 1))]
        self.inputs = inputs
        self.each = [self.provider(cell, one, inputs) for one in self.layers]
        work = self.each[0].work
        self.work = Work(SITES * work.bytes, SITES * work.flops)

    def __call__(self) -> tuple[Tensor, ...]:
        return tuple(y for each in self.each for y in each())

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(y for each in self.each for y in each.plain(dtype))


class ThreeBases(_Sites):
    provider = Base


class Unstacked(_Sites):
    provider = LoraXS


class Stacked(_Sites):
    """The same with one projection for all three."""

    provider = LoraXS

    def __init__(self, cell: Cell, layer: Layer, inputs: Inputs) -> None:
        super().__init__(cell, layer, inputs)
        self.a = torch.cat([one.a for one in self.layers])
        offsets = range(0, SITES * cell.r, cell.r)
        self.sites = [
            Site(one.weight, None, self.a[start : start + cell.r], one.b, one.pages, inputs.slots, SCALE)
            for one, start in zip(self.layers, offsets, strict=True)
        ]

    def __call__(self) -> tuple[Tensor, ...]:
        return tuple(linear_stack(self.inputs.x, self.a, self.sites))


EDORA: Mapping[str, Factory] = {"loraxs + row scale": RowScaled, "loraxs + row scale, applied": Scaled}
STACKED: Mapping[str, Factory] = {"F.linear": ThreeBases, "loraxs": Unstacked, "loraxs stacked": Stacked}
