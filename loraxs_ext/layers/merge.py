"""Folding adapters into the base weight, and what rounding takes away from them on the way."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding of a merged bf16 weight keeps a delta to 3 % where |ΔW| is 5 % of |W|, and loses 30 % of it at 0.5 %.
LOSS_WORTH_A_WARNING = 0.1


class MergeLossWarning(UserWarning):
    """Storing the merged weight in half precision or quantised took away a noticeable part of the adapter.

    Attributes:
        key: name of the layer.
        loss: ‖rounding error‖ / ‖ΔW‖.
    """

    def __init__(self, key: str, loss: float) -> None:
        self.key, self.loss = key, loss
        super().__init__(
            f"{key}: rounding the merged weight changes the adapter's update by {loss:.1%}. Merge into an fp32 copy of "
            f"the model, or serve the adapter unmerged."
        )


def delta_weight(a: Tensor, b: Tensor, core: Tensor, scale: float) -> Tensor:
    """ΔW = s·b R a [N, K] in fp32 (fp64 for an fp64 basis): a [r, K], b [N, r], core R [r, r]."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    with torch.autocast(a.device.type, enabled=False):
        return (b.to(dtype) @ (core.to(dtype) * scale)) @ a.to(dtype)


def rounding_loss(weight: Tensor, delta: Tensor, merged: Tensor) -> float:
    """‖merged − (weight + delta)‖ / ‖delta‖: the part of ΔW that storing the merged weight took away; 0 for no delta.

    Args:
        weight, merged: [N, K] before and after, as they read back.
        delta: ΔW [N, K], fp32 or fp64.
    """
    size = delta.norm()
    return float((merged.to(delta.dtype) - weight.to(delta.dtype) - delta).norm() / size) if size > 0 else 0.0
