"""Autocast at the door of an op, where torch would cast for `F.linear`."""

from __future__ import annotations

from typing import Any

import torch

# One look at all devices: ops ask this first, as every token runs through them and a call of Python costs 1 us there.
any_autocast_enabled = torch._C._is_any_autocast_enabled


def wants_autocast(x: torch.Tensor) -> bool:
    """Whether arguments that meet x are to be cast."""
    return any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def autocast(*tensors: Any) -> list[Any]:
    """Cast to autocast's dtype as torch does for `F.linear`: everything but fp64. Pages keep their own dtype."""
    device = next(t.device.type for t in tensors if t is not None)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
