"""Random inputs of a cell: one set of activations, several sets of frozen weights with the adapters on top."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.cells import SEQUENCE, Cell

SCALE = 0.5


@dataclass
class Layer:
    """One set of frozen weights and the R of every slot."""

    weight: Tensor  # [N, K]
    a: Tensor  # [r, K]
    b: Tensor  # [N, r], b.mT is contiguous unless an owner lays it out beside the weight
    pages: Tensor  # [S, r, r]

    def to(self, dtype: torch.dtype) -> Layer:
        bt = self.b.mT.to(dtype)
        return Layer(self.weight.to(dtype), self.a.to(dtype), bt.mT, self.pages.to(dtype))


@dataclass
class Inputs:
    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    slots: Tensor | None  # int32 [M]; None where there is one adapter

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.x.to(dtype), self.dy.to(dtype), self.slots)


def make_layer(cell: Cell, device: torch.device) -> Layer:
    """Weights for which the low-rank part is as large as the base, so that its errors are seen."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=getattr(torch, cell.dtype))

    return Layer(
        weight=randn(cell.N, cell.K) / cell.K**0.5,
        a=randn(cell.r, cell.K) / cell.K**0.5,
        b=(randn(cell.r, cell.N) / cell.N**0.5).mT,
        pages=randn(cell.adapters, cell.r, cell.r) * (cell.N / cell.r) ** 0.5,
    )


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    dtype = getattr(torch, cell.dtype)
    if cell.one_adapter:
        slots = None
    else:
        tokens = torch.arange(cell.M, device=device, dtype=torch.int32)
        distinct = tokens if cell.adapters == cell.M else tokens // SEQUENCE
        slots = distinct.clamp_max(cell.adapters - 1)
    return Inputs(
        x=torch.randn(cell.M, cell.K, device=device, dtype=dtype),
        dy=torch.randn(cell.M, cell.N, device=device, dtype=dtype),
        slots=slots,
    )
