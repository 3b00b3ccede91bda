"""What is timed against each other: the base layer, LoRA-XS by every owner, and what peers offer (`peers`).

A provider is built once per set of weights. Calling it does the work; `plain` gives the same outputs by the textbook
formula in any dtype, which is both the fp64 truth and the yardstick of the 2x rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import owners
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.data import SCALE, Inputs, Layer
from benchmarks.gpu.limits import Work, base_work, loraxs_work
from loraxs_ext import ops


class Provider(Protocol):
    """One way to compute a cell with one set of weights."""

    work: Work
    inputs: Inputs

    def __call__(self) -> tuple[Tensor, ...]:
        """y, and the gradients of x and of what is trained where the cell trains."""

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same by its formula in plain torch, computed in `dtype`."""


Factory = Callable[[Cell, Layer, Inputs], Provider]


class Refused(Exception):
    """This provider cannot compute this cell on this machine; the message says why."""


def gradients(y: Tensor, dy: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """y without its graph, and the gradients of `leaves`."""
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def plain_loraxs(x: Tensor, layer: Layer, pages: Tensor, slots: Tensor | None) -> Tensor:
    """y = x Wᵀ + s·(x aᵀ) R_slotᵀ bᵀ as a user writes it."""
    p = F.linear(x, layer.a)
    q = F.linear(p, pages[0]) if slots is None else torch.einsum("mij,mj->mi", pages[slots.long()], p)
    return F.linear(x, layer.weight) + SCALE * F.linear(q, layer.b)


class Base:
    """The frozen layer alone; with dx where the cell trains."""

    def __init__(self, cell: Cell, layer: Layer, inputs: Inputs) -> None:
        self.cell, self.layer, self.inputs = cell, layer, inputs
        self.work = base_work(cell)
        self.x = inputs.x.detach().requires_grad_(cell.backward)

    def __call__(self) -> tuple[Tensor, ...]:
        return self._of(self.x, self.layer.weight, self.inputs.dy)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = self.inputs.x.to(dtype).requires_grad_(self.cell.backward)
        return self._of(x, self.layer.weight.to(dtype), self.inputs.dy.to(dtype))

    def _of(self, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(x, weight)
        return gradients(y, dy, x) if self.cell.backward else (y,)


class LoraXS:
    """LoRA-XS through the public function, as the layers call it: what users get."""

    def __init__(self, cell: Cell, layer: Layer, inputs: Inputs) -> None:
        self.cell, self.layer, self.inputs = cell, layer, inputs
        self.work = loraxs_work(cell)
        self.x = inputs.x.detach().requires_grad_(cell.backward)
        self.pages = layer.pages.detach().requires_grad_(cell.backward)

    def __call__(self) -> tuple[Tensor, ...]:
        y = self._forward()
        return gradients(y, self.inputs.dy, self.x, self.pages) if self.cell.backward else (y,)

    def _forward(self) -> Tensor:
        layer = self.layer
        return ops.linear(self.x, layer.weight, None, layer.a, layer.b, self.pages, self.inputs.slots, SCALE)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        layer, inputs = self.layer.to(dtype), self.inputs.to(dtype)
        x, pages = (t.detach().requires_grad_(self.cell.backward) for t in (inputs.x, layer.pages))
        y = plain_loraxs(x, layer, pages, inputs.slots)
        return gradients(y, inputs.dy, x, pages) if self.cell.backward else (y,)


class Naive(LoraXS):
    """LoRA-XS as a user writes it: its own yardstick, timed."""

    def _forward(self) -> Tensor:
        return plain_loraxs(self.x, self.layer, self.pages, self.inputs.slots)


class Owned(LoraXS):
    """LoRA-XS by one named owner, called directly: forward, and its backward op where the cell trains."""

    owner = owners.PLAIN_TORCH

    def __init__(self, cell: Cell, layer: Layer, inputs: Inputs) -> None:
        super().__init__(cell, layer, inputs)
        try:
            if not owners.differs_from_triton(self.owner, cell.M):
                raise Refused(f"the same kernel as {owners.TRITON}'s for so few tokens")
            weight, b = owners.laid_out(self.owner, layer.weight, layer.b)
            self.layer = replace(layer, weight=weight, b=b)
            self.linear = owners.find(self.owner, "linear")
            self.linear_backward = owners.find(self.owner, "linear_backward") if cell.backward else None
        except owners.NotBuilt as error:
            raise Refused(str(error)) from None

    def __call__(self) -> tuple[Tensor, ...]:
        layer, inputs = self.layer, self.inputs
        low_rank = (layer.a, layer.b, layer.pages, inputs.slots)
        y, p = self.linear(inputs.x, layer.weight, None, *low_rank, SCALE, 0.0, None)
        if self.linear_backward is None:
            return (y,)
        dx, dpages = self.linear_backward(inputs.dy, layer.weight, *low_rank, p, SCALE, 0.0, None, True, True)
        return y, dx, dpages


def owned(owner: str) -> type[Owned]:
    """The provider that calls `owner` directly."""
    return type(f"Owned by {owner}", (Owned,), {"owner": owner})


BASE, OURS, NAIVE = "F.linear", "loraxs", "naive"
LORAXS: Mapping[str, Factory] = {
    BASE: Base,
    OURS: LoraXS,
    **{f"loraxs {name}": owned(name) for name in owners.OWNERS if name != owners.DISPATCHER},
    NAIVE: Naive,
}
