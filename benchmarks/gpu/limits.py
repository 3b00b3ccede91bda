"""The two ceilings of a device, measured, and the time below which no version of a cell can run."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.clock import Clock

COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192
ROUNDS = 15


class Ceilings(NamedTuple):
    """Bytes per second, read and written, of a device-to-device copy; FLOP per second of a bf16 matrix product."""

    bandwidth: float
    flops: float


class Work(NamedTuple):
    """The fewest bytes that must be moved, each input read once and each output written once; the operations."""

    bytes: float
    flops: float

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bandwidth, self.flops / ceilings.flops)


def measure_ceilings(clock: Clock, device: torch.device, dry: bool) -> Ceilings:
    """Medians over random data: a matrix product of zeros can run faster than one of numbers."""
    size = 64 if dry else MATMUL_SIZE
    source = torch.randn(COPY_BYTES // 4 if not dry else 1024, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))

    def copy() -> None:
        target.copy_(source)

    def product() -> torch.Tensor:
        return left @ right

    copy()
    product()
    copied = statistics.median(clock.seconds(copy, 4) for _ in range(ROUNDS)) / 4
    multiplied = statistics.median(clock.seconds(product, 4) for _ in range(ROUNDS)) / 4
    return Ceilings(2 * source.nbytes / copied, 2 * size**3 / multiplied)


def base_work(cell: Cell) -> Work:
    """y = x Wᵀ, and dx = dy W where the cell trains."""
    size, passes = getattr(torch, cell.dtype).itemsize, 2 if cell.backward else 1
    once = cell.N * cell.K + cell.M * cell.K + cell.M * cell.N
    return Work(size * once * passes, 2.0 * cell.M * cell.N * cell.K * passes)


def loraxs_work(cell: Cell) -> Work:
    """The base with p, q and q bᵀ; a and b are read once, every R once."""
    base, size, passes = base_work(cell), getattr(torch, cell.dtype).itemsize, 2 if cell.backward else 1
    frozen = cell.r * (cell.N + cell.K) + cell.adapters * cell.r**2
    low_rank = 2.0 * cell.M * cell.r * (cell.N + cell.K + cell.r)
    return Work(base.bytes + size * frozen * passes, base.flops + low_rank * passes)


def lora_work(cell: Cell, adapters: int) -> Work:
    """The base with x Aᵀ Bᵀ, where every adapter brings its own A and B; their gradients where the cell trains."""
    base, size, passes = base_work(cell), getattr(torch, cell.dtype).itemsize, 2 if cell.backward else 1
    own = adapters * cell.r * (cell.N + cell.K)
    low_rank = 2.0 * cell.M * cell.r * (cell.N + cell.K)
    return Work(base.bytes + size * own * passes, base.flops + low_rank * (3 if cell.backward else 1))
