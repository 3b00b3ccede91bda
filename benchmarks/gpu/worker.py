"""The process that touches the device: measures the planned cells in turn and reports each as one line of JSON.

`python -m benchmarks.gpu.worker` is started by `gpu_check.py`, which survives it: a kernel that reads out of bounds
takes the whole process with it, and one that never ends has to be killed. It is then started again without its author.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from functools import partial
from typing import Any, TextIO

import torch

from benchmarks._measure import environment, gpu_environment
from benchmarks.gpu import basis, serving
from benchmarks.gpu.cells import BASIS, KINDS, SERVING, WIDTHS, Cell, dry_plan, named_cells, plan
from benchmarks.gpu.clock import Clock, CpuClock, CudaClock
from benchmarks.gpu.dry import correct_the_interpreter
from benchmarks.gpu.limits import measure_ceilings
from benchmarks.gpu.measure import measure
from benchmarks.gpu.memory import measure_memory


def tell(stream: TextIO, event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), file=stream, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", type=float, required=True, help="time.time() at which to stop")
    parser.add_argument("--first", type=int, default=0, help="number of the cell to begin with")
    parser.add_argument("--exclude", nargs="*", default=[], help="kind:provider of those that broke the device")
    parser.add_argument("--kinds", nargs="*", default=[*KINDS, BASIS, SERVING])
    parser.add_argument("--seconds", type=float, default=0.5, help="of alternation per cell")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    # Whatever libraries print goes to stderr; stdout carries lines of JSON alone.
    stream, sys.stdout = sys.stdout, sys.stderr
    dry = arguments.dry_run
    if dry:
        correct_the_interpreter()
    device = torch.device("cpu" if dry else "cuda")
    clock: Clock = CpuClock() if dry else CudaClock()
    kinds = tuple(arguments.kinds)
    cells = dry_plan(kinds) if dry else plan(kinds)
    tell(stream, "plan", cells=[str(cell) for cell in cells])
    tell(stream, "environment", environment=environment() | ({} if dry else gpu_environment()))
    tell(stream, "begin", cell=-1, provider="ceilings")
    ceilings = measure_ceilings(clock, device, dry)
    tell(stream, "ceilings", copy_bytes_per_second=ceilings.bandwidth, bf16_flop_per_second=ceilings.flops)
    if arguments.first == 0 and "training" in kinds:
        tell(stream, "memory", row=measure_memory(_memory_cell(dry), device))
    # After what the targets name, before the rest of the grid.
    models_before = min(sum(cell in named_cells() for cell in cells), len(cells))
    for number in range(arguments.first, len(cells) + 1):
        if time.time() > arguments.until:
            break
        if number == models_before and BASIS in kinds and f"{BASIS}:{BASIS}" not in arguments.exclude:
            tell(stream, "begin", cell=number, kind=BASIS, provider=BASIS)
            rows = basis.measure(device, dry=dry, bandwidth=None if dry else ceilings.bandwidth)
            tell(stream, "basis", rows=rows)
        if number == models_before and SERVING in kinds and f"{SERVING}:{SERVING}" not in arguments.exclude:
            begin = partial(tell, stream, "begin", cell=number, kind=SERVING, provider=SERVING)
            for row in serving.measure(device, clock=clock, dry=dry, begin=lambda what, begin=begin: begin(what=what)):
                tell(stream, "serving", row=row)
        if number == len(cells):
            break
        row = measure(
            cells[number],
            clock,
            ceilings,
            device,
            seconds=arguments.seconds,
            excluded=arguments.exclude,
            begin=lambda provider, number=number: tell(
                stream, "begin", cell=number, kind=cells[number].kind, provider=provider
            ),
        )
        tell(stream, "row", cell=number, row=row)
    tell(stream, "end")


def _memory_cell(dry: bool) -> Cell:
    cell = Cell("training", 4096, *WIDTHS[0], 16)
    return dataclasses.replace(cell, M=32, N=48, K=40, dtype="float32") if dry else cell


if __name__ == "__main__":
    main()
