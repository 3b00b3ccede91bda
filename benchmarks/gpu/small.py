"""Every op by every owner once on small shapes: what a memory checker, a hundred times slower, can get through."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import owners
from benchmarks.gpu.dry import correct_the_interpreter

# (M, K, N, r, S): odd widths and rank, more rows than one tile, a batch for the kernels of many tokens. Few, because
# every one compiles kernels of its own.
SHAPES = ((5, 129, 65, 5, 3), (40, 96, 160, 16, 4), (140, 128, 128, 64, 2))
DTYPE = torch.bfloat16

# Why an op was left out.
MISSING: set[str] = set()


def problem(shape: Sequence[int], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    M, K, N, r, S = shape
    sizes = {"x": (M, K), "weight": (N, K), "a": (r, K), "bt": (r, N), "pages": (S, r, r), "dy": (M, N)}
    found = {name: torch.randn(size, device=device).to(dtype) for name, size in sizes.items()}
    found["slots"] = (torch.arange(M, device=device) % (S + 1) - 1).to(torch.int32)
    return found


def run(owner: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> None:
    t = problem(shape, dtype, device)
    weight, b = owners.laid_out(owner, t["weight"], t["bt"].mT)
    low_rank = (t["a"], b, t["pages"], t["slots"])
    rng = torch.tensor([7, 3], device=device)
    p = owners.find(owners.PLAIN_TORCH, "project")(t["x"], t["a"])
    for p_drop in (0.0, 0.25):
        dropout = (0.5, p_drop, rng)
        attempt(owner, "linear", t["x"], weight, None, *low_rank, *dropout)
        attempt(owner, "add_delta_", t["dy"].clone(), t["x"], *low_rank, *dropout)
        attempt(owner, "linear_backward", t["dy"], weight, *low_rank, p, *dropout, True, True)
    attempt(owner, "project", t["x"], t["a"])
    attempt(owner, "linear_projected", t["x"], weight, None, p, *low_rank, 0.5)
    rho, m = torch.rand(len(b), device=device), torch.ones(shape[-1], len(b), device=device)
    attempt(owner, "row_scale", rho, b, t["pages"], None, m, 0.5)
    for slots in (None, t["slots"]):
        attempt(owner, "rescale", t["dy"], m, slots, t["dy"][0])
        attempt(owner, "rescale_backward", t["dy"], t["dy"], m, slots, True)


def attempt(owner: str, op: str, *arguments: Any) -> None:
    """Call the op, if the owner has it."""
    try:
        owners.find(owner, op)(*arguments)
    except owners.NotBuilt as reason:
        MISSING.add(str(reason))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one shape, as a dry run wants it")
    arguments = parser.parse_args()
    device, shapes = arguments.device, SHAPES[:1] if arguments.quick else SHAPES
    if device == "cpu":
        correct_the_interpreter()
    for owner in owners.OWNERS:
        try:
            for shape in shapes:
                run(owner, shape, DTYPE, device)
        except owners.NotBuilt as reason:
            MISSING.add(str(reason))
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{owner}: done", flush=True)
    print("\n".join(sorted(MISSING)))


if __name__ == "__main__":
    main()
