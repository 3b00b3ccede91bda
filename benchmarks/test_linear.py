"""pytest-benchmark view of `benchmarks.linear`: a few cells, each checked first, with the ratios in extra_info.

For the full grid and its table run `python -m benchmarks.linear`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks._measure import alternate, ratio
from benchmarks.linear import Cell, check, make_inputs, make_layers, providers

CELLS = [
    Cell("fp32", 1024, 8, 16, False),
    Cell("bf16", 384, 1, 16, False),
    Cell("bf16", 1024, 8, 16, False),
    Cell("bf16", 1024, 512, 16, False),
    Cell("bf16", 1024, 512, 16, True),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_linear(benchmark, cell: Cell) -> None:
    torch.manual_seed(0)
    layers, inputs = make_layers(cell), make_inputs(cell)
    check(cell, layers[0], inputs)
    calls = providers(cell, layers, inputs)
    samples = alternate(calls, 0.5)
    benchmark.group = f"linear {cell.dtype}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), **cell._asdict()}
    benchmark.extra_info |= {f"{name} / F.linear": ratio(samples, name, "F.linear") for name in samples}
    benchmark(calls["loraxs"])
