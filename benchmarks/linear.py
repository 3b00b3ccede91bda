"""`loraxs::linear` on the CPU against torch's linear, three plain matmuls and PEFT's LoRA.

    python -m benchmarks.linear            full grid, under ten minutes on two cores
    python -m benchmarks.linear --quick    the corners of the grid, half a minute

Every cell is checked against fp64 first, then all providers alternate; ratios are to `F.linear` in the same round.
Weights rotate through several sets, so that a cell does not run out of a cache that a model would not fit. A mixed
batch is timed twice: `mixed` with the same R's for every set, in the order of their slots; `own` as in a model, where
every layer has R's of its own that come from memory, in a random order. Beside the latter stands what a single adapter
and the mere moving of those R's take one after the other. That is a yardstick, no lower bound: `mixed` finds part of
its R's in the caches, and a kernel may read them while it multiplies.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._measure import alternate, ratio, summary, write_results
from loraxs_ext import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTHS = (384, 1024, 4096)
TOKENS = (1, 8, 64, 512)
RANKS = (4, 16, 64)

# A training batch, at one rank and where it does not take minutes.
BATCH_TOKENS, BATCH_RANK, BATCH_WIDTH = 4096, 16, 1024
SCALE = 0.5

# What a mixed batch may take longer than a single adapter.
MIXED_LIMIT = 1.05
MOVING = "moving the R's"

# Rotating weights should outgrow a core's L2 cache many times, without filling the machine's memory.
ROTATE_BYTES = 128 << 20
ROTATE_SETS = 8


class Cell(NamedTuple):
    """One point of the grid: square layers of this width, M tokens, rank r."""

    dtype: str
    width: int
    M: int
    r: int
    backward: bool

    def __str__(self) -> str:
        return f"{self.dtype}-{self.width}-M{self.M}-r{self.r}-{'fwd+bwd' if self.backward else 'fwd'}"


@dataclass
class Layer:
    """One set of frozen weights, as each provider wants it."""

    weight: Tensor
    a: Tensor
    b: Tensor
    peft: nn.Module


@dataclass
class Inputs:
    x: Tensor
    dy: Tensor
    pages: Tensor  # [M, r, r]: page 0 is the single adapter, all of them the mixed batch
    slots: Tensor


def make_layer(width: int, r: int, dtype: torch.dtype) -> Layer:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    weight = (torch.randn(width, width) / width**0.5).to(dtype)
    linear = nn.Linear(width, width, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    lora = Linear(linear, "default", config=LoraConfig(r=r, lora_alpha=2 * r, init_lora_weights="gaussian"), r=r)
    return Layer(
        weight=weight,
        a=(torch.randn(r, width) / width**0.5).to(dtype),
        b=(torch.randn(r, width) / r**0.5).to(dtype).mT,
        peft=lora.to(dtype),
    )


def make_inputs(cell: Cell) -> Inputs:
    dtype = DTYPES[cell.dtype]
    return Inputs(
        x=torch.randn(cell.M, cell.width).to(dtype),
        dy=torch.randn(cell.M, cell.width).to(dtype),
        pages=torch.randn(cell.M, cell.r, cell.r).to(dtype),
        slots=torch.arange(cell.M, dtype=torch.int32),
    )


def naive(x: Tensor, layer: Layer, pages: Tensor) -> Tensor:
    """LoRA-XS as a user writes it: three matmuls and a sum."""
    return F.linear(x, layer.weight) + SCALE * F.linear(F.linear(F.linear(x, layer.a), pages[0]), layer.b)


def fused(x: Tensor, layer: Layer, pages: Tensor) -> Tensor:
    return ops.linear(x, layer.weight, None, layer.a, layer.b, pages, None, SCALE)


def mixed(x: Tensor, layer: Layer, pages: Tensor, slots: Tensor) -> Tensor:
    return ops.linear(x, layer.weight, None, layer.a, layer.b, pages, slots, SCALE)


def check(cell: Cell, layer: Layer, inputs: Inputs) -> None:
    """Error against fp64 at most twice the naive error, or AssertionError: y, both gradients, rows of a mixed batch."""
    dtype = inputs.x.dtype

    def cast(to: torch.dtype) -> Layer:
        return Layer(layer.weight.to(to), layer.a.to(to), layer.b.mT.to(to).mT, layer.peft)

    def run(f: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        x = inputs.x.to(to).requires_grad_(cell.backward)
        pages = inputs.pages[:1].to(to).requires_grad_(cell.backward)
        y = f(x, cast(to), pages)
        if not cell.backward:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, (x, pages), inputs.dy.to(to))]

    def compare(name: str, exact: Tensor, plain: Tensor, ours: Tensor) -> None:
        limit = 2 * float((plain - exact).norm() / exact.norm()) + torch.finfo(torch.float32).eps
        got = float((ours - exact).norm() / exact.norm())
        assert got <= limit, f"{cell}: {name}: error {got:.2e} exceeds twice the naive error {limit:.2e}"

    results = run(naive, torch.float64), run(naive, dtype), run(fused, dtype)
    for name, exact, plain, ours in zip(("y", "dx", "dpages"), *results, strict=False):
        compare(name, exact, plain, ours)

    def alone(to: torch.dtype) -> Tensor:
        one = cast(to)
        return torch.cat([naive(inputs.x[i : i + 1].to(to), one, inputs.pages[i : i + 1].to(to)) for i in rows])

    rows = range(min(cell.M, 4))
    with torch.no_grad():
        ours = mixed(inputs.x, layer, inputs.pages, inputs.slots)[: len(rows)]
        compare("rows of a mixed batch", alone(torch.float64), alone(dtype), ours)


def providers(cell: Cell, layers: list[Layer], inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Every provider as a call without arguments that moves on to the next set of weights."""

    many = inputs.pages.clone().requires_grad_(cell.backward)
    one = many[:1].detach().clone().requires_grad_(cell.backward)
    own = [inputs.pages.clone().requires_grad_(cell.backward) for _ in layers]
    order = torch.randperm(cell.M, dtype=torch.int32)

    def rotating(
        f: Callable[[Tensor, Layer, Tensor], Tensor],
        pages: list[Tensor] | Tensor,
        trained: Callable[[Layer, Tensor], tuple[Tensor, ...]] = lambda layer, pages: (pages,),
    ) -> Callable[[], Any]:
        turn = itertools.cycle(zip(layers, pages if isinstance(pages, list) else [pages] * len(layers), strict=True))
        if not cell.backward:

            def forward() -> Tensor:
                return f(inputs.x, *next(turn))

            return torch.no_grad()(forward)

        x = inputs.x.clone().requires_grad_()

        def forward_backward() -> Any:
            layer, pages = next(turn)
            return torch.autograd.grad(f(x, layer, pages), (x, *trained(layer, pages)), inputs.dy)

        return forward_backward

    def factors(layer: Layer, pages: Tensor) -> tuple[Tensor, ...]:
        return layer.peft.lora_A["default"].weight, layer.peft.lora_B["default"].weight

    return {
        "F.linear": rotating(lambda x, layer, _: F.linear(x, layer.weight), one, lambda layer, _: ()),
        "naive": rotating(naive, one),
        "peft lora": rotating(lambda x, layer, _: layer.peft(x), one, factors),
        "loraxs": rotating(fused, one),
        "loraxs mixed": rotating(lambda x, layer, pages: mixed(x, layer, pages, inputs.slots), many),
        "loraxs own": rotating(lambda x, layer, pages: mixed(x, layer, pages, order), own),
        MOVING: moving(cell, own),
    }


def moving(cell: Cell, own: list[Tensor]) -> Callable[[], Any]:
    """A call that reads as many bytes as the next R's have; in training it reads them twice and writes as many."""
    turn = itertools.cycle([torch.randn(max(1, pages.nbytes // 4)) for pages in own])

    def read() -> Any:
        return next(turn).sum()

    def read_and_write() -> Any:
        numbers = next(turn)
        return numbers.sum(), numbers.sum(), torch.empty_like(numbers).fill_(1)

    return read_and_write if cell.backward else read


def make_layers(cell: Cell) -> list[Layer]:
    dtype = DTYPES[cell.dtype]
    sets = min(ROTATE_SETS, max(2, ROTATE_BYTES // (cell.width**2 * dtype.itemsize)))
    return [make_layer(cell.width, cell.r, dtype) for _ in range(sets)]


def measure(cell: Cell, layers: list[Layer], seconds: float) -> dict[str, Any]:
    """Check one cell, time it, and return its row."""
    inputs = make_inputs(cell)
    check(cell, layers[0], inputs)
    samples = alternate(providers(cell, layers, inputs), seconds)
    row: dict[str, Any] = dict(cell._asdict(), times={name: summary(t) for name, t in samples.items()})
    row["ratio"] = {name: ratio(samples, name, "F.linear") for name in samples if name not in ("F.linear", MOVING)}
    row["loraxs_over_naive"] = ratio(samples, "loraxs", "naive")
    row["mixed_over_single"] = ratio(samples, "loraxs mixed", "loraxs")
    row["own_over_single"] = ratio(samples, "loraxs own", "loraxs")
    row["single_and_moving_over_single"] = 1 + ratio(samples, MOVING, "loraxs")
    return row


COLUMNS = ("naive", "peft", "loraxs", "mixed", "own", "mixed/single", "own/single")
HEADER = f"{'cell':32} {'F.linear us (p10-p90)':>26}" + "".join(f" {name:>{max(7, len(name))}}" for name in COLUMNS)


def line(row: dict[str, Any]) -> str:
    cell = Cell(*(row[f] for f in Cell._fields))
    base, r = row["times"]["F.linear"], row["ratio"]
    spread = f"{base['median_us']:.1f} ({base['p10_us']:.1f}-{base['p90_us']:.1f})"
    flags = " slower than naive" if row["loraxs_over_naive"] > 1 else ""
    names = ("naive", "peft lora", "loraxs", "loraxs mixed", "loraxs own")
    ratios = " ".join(f"{r[name]:7.2f}" for name in names)
    return f"{cell!s:32} {spread:>26} {ratios} {row['mixed_over_single']:12.2f} {row['own_over_single']:10.2f}{flags}"


def conclusion(rows: list[dict[str, Any]]) -> str:
    """How many cells are slower than naive, and where a mixed batch costs more than `MIXED_LIMIT` times one adapter."""
    found = [f"slower than naive in {sum(row['loraxs_over_naive'] > 1 for row in rows)} of {len(rows)} cells"]
    for backward, direction in ((False, "forward"), (True, "forward and backward")):
        cells = [row for row in rows if row["backward"] == backward]
        for way in ("mixed", "own"):
            over = [row for row in cells if row[f"{way}_over_single"] > MIXED_LIMIT]
            found.append(f"{direction}: {way}/single at most {MIXED_LIMIT} in {len(cells) - len(over)} of {len(cells)}")
            for row in over:
                found.append(f"  {Cell(*(row[f] for f in Cell._fields))!s:30} {row[f'{way}_over_single']:.2f}")
                if way == "own":
                    found[-1] += f"; single and moving the R's: {row['single_and_moving_over_single']:.2f}"
    return "\n".join(found)


def grid(quick: bool) -> list[tuple[str, int, int]]:
    """(dtype, width, r): the cells that share weights."""
    widths, ranks = ((384, 1024), (16,)) if quick else (WIDTHS, RANKS)
    return list(itertools.product(DTYPES, widths, ranks))


def tokens(width: int, r: int, quick: bool) -> tuple[int, ...]:
    return (*TOKENS, BATCH_TOKENS) if not quick and r == BATCH_RANK and width <= BATCH_WIDTH else TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="widths 384 and 1024, rank 16, short runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--seconds", type=float, help="time per cell; default 2, or 0.5 with --quick")
    parser.add_argument("--output", help="name of the results file; default linear-cpu, nothing with --quick")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    seconds = args.seconds or (0.5 if args.quick else 2.0)
    print(f"{torch.get_num_threads()} threads; times of F.linear in us, the rest as ratios to it\n{HEADER}")
    rows = []
    for dtype, width, r in grid(args.quick):
        layers = make_layers(Cell(dtype, width, 1, r, False))
        for backward, M in itertools.product((False, True), tokens(width, r, args.quick)):
            rows.append(measure(Cell(dtype, width, M, r, backward), layers, seconds))
            print(line(rows[-1]), flush=True)
    print("\n" + conclusion(rows))
    output = args.output or (None if args.quick else "linear-cpu")
    if output:
        print(f"written to {write_results(output, rows, seconds_per_cell=seconds)}")


if __name__ == "__main__":
    main()
