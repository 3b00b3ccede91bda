"""The rule every figure must pass first: against fp64, at most twice the error of plain torch in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Roundings of the accumulation dtype that are free: in a result of few numbers plain torch can be right by luck.
FREE_ROUNDINGS = 3


class Wrong(Exception):
    """An output is not finite, or further from the truth than the rule allows."""


def error(got: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@torch.no_grad()
def assert_right(
    outputs: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]
) -> dict[str, dict[str, float]]:
    """The errors of all outputs by name, or Wrong.

    Args:
        outputs: y, then gradients, by the candidate.
        plain: the same by plain torch in the dtype of the candidate.
        exact: the same in fp64.
    """
    found = {}
    for number, (got, yardstick, truth) in enumerate(zip(outputs, plain, exact, strict=True)):
        name = "y" if number == 0 else f"output {number}"
        if got.shape != truth.shape:
            raise Wrong(f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
        unwritten = int((~torch.isfinite(got)).sum())
        if unwritten:
            raise Wrong(f"{name}: {unwritten} of {got.numel()} numbers are not finite")
        floor = FREE_ROUNDINGS * torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
        ours, theirs = error(got, truth), error(yardstick, truth)
        if ours > 2 * theirs + floor:
            raise Wrong(f"{name}: error {ours:.2e} exceeds twice plain torch's {theirs:.2e}")
        found[name] = {"error": ours, "plain_torch": theirs}
    return found


def poison_allocator(device: torch.device | str, megabytes: int = 64) -> None:
    """Leave NaN in the memory that the next allocations will be given, so that what nobody writes is seen.

    Only a caching allocator hands the same memory out again; on the CPU this covers small tensors.
    """
    large = torch.full((megabytes << 18,), torch.nan, device=device)
    small = [torch.full((size,), torch.nan, device=device) for size in (128, 4096, 65536) for _ in range(16)]
    del large, small
