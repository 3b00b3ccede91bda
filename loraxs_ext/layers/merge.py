"""Folding adapters into the base weight, and what rounding takes away from them on the way."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding of a merged bf16 weight keeps a delta to 3 % where |ΔW| is 5 % of |W|, and loses 30 % of it at 0.5 %.
LOSS_WORTH_A_WARNING = 0.1


class MergeLossWarning(UserWarning):
    """Merging into a half-precision weight rounded away a noticeable part of the adapter.

    Attributes:
        key: name of the layer.
        loss: ‖rounding error‖ / ‖ΔW‖.
    """

    def __init__(self, key: str, loss: float) -> None:
        self.key, self.loss = key, loss
        super().__init__(
            f"{key}: rounding the merged weight to half precision changes the adapter's update by {loss:.1%}. Merge "
            f"into an fp32 copy of the model, or serve the adapter unmerged."
        )


def delta_weight(a: Tensor, b: Tensor, core: Tensor, scale: float) -> Tensor:
    """ΔW = s·b R a [N, K] in fp32 (fp64 for an fp64 basis): a [r, K], b [N, r], core R [r, r]."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (b.to(dtype) @ (core.to(dtype) * scale)) @ a.to(dtype)


def merged_weight(weight: Tensor, delta: Tensor) -> tuple[Tensor, float]:
    """weight + delta, added in the precision of delta and rounded once, with the relative loss of that rounding.

    Args:
        weight: the frozen weight, any layout and float dtype.
        delta: ΔW in the same layout, fp32 or fp64.

    Returns:
        the merged weight in the dtype of `weight`, and ‖merged − weight − delta‖ / ‖delta‖ (0 for a zero delta).
    """
    exact = weight.to(delta.dtype) + delta
    merged = exact.to(weight.dtype)
    size = delta.norm()
    if merged.dtype == exact.dtype or not size > 0:
        return merged, 0.0
    return merged, float((merged.to(exact.dtype) - exact).norm() / size)
