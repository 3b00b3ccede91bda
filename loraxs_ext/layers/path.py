"""What a layer adds to the output of its base layer: the arguments of one op call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraxs_ext import ops


class LowRankPath(NamedTuple):
    """Arguments of one op call: y += scale · (drop(x) aᵀ Rᵀ) bᵀ with R = pages[slot]."""

    a: Tensor
    b: Tensor
    pages: Tensor
    slots: Tensor | None = None
    scale: float = 1.0
    p_drop: float = 0.0


def add_path(y: Tensor, x: Tensor, path: LowRankPath, rng: Tensor | None = None) -> Tensor:
    """y [..., N] + the low-rank part of x [..., K], in the dtype of y; the mask is drawn unless rng gives it."""
    dtype = path.a.dtype
    if path.pages.dtype not in (dtype, torch.float32):
        # FSDP2 computes in another dtype than it stores, and takes R along; buffers stay as they are.
        path = path._replace(pages=path.pages.to(dtype))
    rng = draw_rng(x) if path.p_drop and rng is None else rng
    return ops.add_delta(y.to(dtype), x.to(dtype), *path[:5], p_drop=path.p_drop, rng=rng).to(y.dtype)


def draw_rng(x: Tensor) -> Tensor:
    """(seed, offset) of one dropout mask, from the generator of x's device: recomputation in checkpoints repeats it."""
    return torch.randint(2**62, (2,), dtype=torch.int64, device=x.device)
