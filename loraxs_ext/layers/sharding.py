"""Parameters that are shared out between processes (DTensor), where one needs the whole."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor; without importing what may never have been used."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def complete(parameter: Tensor) -> Tensor:
    """All of a parameter, differentiable; collective over the processes of its mesh if it is sharded.

    FSDP2 gathers the parameters of a block for that block. What another block reads of them is gathered here, and its
    gradient is averaged over the processes, as FSDP2 averages the others.
    """
    if not is_sharded(parameter):
        return parameter
    sharded: Any = parameter
    mesh = sharded.device_mesh
    partial = sys.modules["torch.distributed.tensor"].Partial()
    full = sharded.full_tensor(grad_placements=[partial] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy `value`, which is complete and the same on all processes, into a parameter or this process's part of it."""
    target: Any = parameter
    if is_sharded(target):
        distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
        value = value.to(target.device, target.dtype)
        value = distribute(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
