"""The loss of a batch of many adapters: for each one the mean over its own rows, as if it were alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


class AdapterLoss(NamedTuple):
    """The loss of a batch.

    Attributes:
        total: to go backward from: the sum over adapters of their mean losses.
        sums: [rows] fp32, the summed loss of each row, without a graph.
        items: int64 [rows], how many labels count in each row.
    """

    total: Tensor
    sums: Tensor
    items: Tensor


def adapter_loss(
    logits: Tensor, labels: Tensor, slots: Tensor, *, shift: bool = False, items: Tensor | None = None
) -> AdapterLoss:
    """Σ over adapters of the mean loss over the adapter's own labels; no adapter's gradient depends on another's rows.

    Args:
        logits, labels, shift: see `row_losses`.
        slots: integers [rows], the adapter of each row; rows of slot −1 do not count.
        items: int64 [S], the labels of each adapter in all batches whose gradients are accumulated; None if this batch
            is the only one.
    """
    sums = row_losses(logits, labels, shift=shift)
    counts = row_items(labels, shift=shift)
    slots = slots.to(sums.device)
    if items is None:
        here = slots[:, None] == slots[None, :]
        items_of_row = (here * counts).sum(1)
    else:
        items_of_row = items.to(sums.device)[slots.clamp_min(0)]
    means = sums / items_of_row.clamp_min(1)
    return AdapterLoss(torch.where(slots >= 0, means, 0.0).sum(), sums.detach(), counts)


def row_losses(logits: Tensor, labels: Tensor, *, shift: bool = False) -> Tensor:
    """[rows]: the summed loss of each row, in fp32 (fp64 for fp64 logits).

    Args:
        logits: [rows, ..., classes]; [rows] or [rows, 1] for a regression.
        labels: integers [rows, ...], where −100 does not count: cross entropy. Floats [rows]: squared error.
        shift: labels [rows, T] are those of the next position, as in causal language models.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if labels.is_floating_point():
        return (logits.reshape(labels.shape) - labels.to(logits.dtype)).square().reshape(len(labels), -1).sum(1)
    labels = _shifted(labels) if shift else labels
    each = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return each.reshape(len(labels), -1).sum(1)


def row_items(labels: Tensor, *, shift: bool = False) -> Tensor:
    """int64 [rows]: how many labels count in each row; arguments as in `row_losses`."""
    counted = torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED
    return (counted[:, 1:] if shift else counted).reshape(len(labels), -1).sum(1)


def adapter_items(labels: Tensor, slots: Tensor, adapters: int, *, shift: bool = False) -> Tensor:
    """int64 [adapters]: how many labels of each adapter count; arguments as in `adapter_loss`."""
    counts, slots = row_items(labels, shift=shift), slots.to(labels.device, torch.int64)
    return counts.new_zeros(adapters).index_add_(0, slots.clamp_min(0), counts * (slots >= 0))


def _shifted(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
