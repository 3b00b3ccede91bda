"""What one layer keeps for its backward pass, beside the tensors that exist anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.data import make_inputs, make_layer
from benchmarks.gpu.peers import PeftLora
from benchmarks.gpu.providers import LoraXS, Naive


def saved_bytes(forward: Callable[[], Tensor], frozen: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd saved while `forward` ran, without those of `frozen` and of the result.

    The input of a layer counts: an optimised layer need not keep it.
    """
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()
    for tensor in (*frozen, y):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def measure_memory(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Saved bytes of LoRA-XS, its naive form and PEFT's LoRA at the shape of a training cell."""
    layer, inputs = make_layer(cell, device), make_inputs(cell, device)
    row: dict[str, Any] = {**cell.to_dict(), "saved_bytes": {}}
    frozen = [layer.weight, layer.a, layer.b, layer.pages]
    for name, factory in {"loraxs": LoraXS, "naive": Naive}.items():
        row["saved_bytes"][name] = saved_bytes(factory(cell, layer, inputs)._forward, frozen)
    lora = PeftLora(cell, layer, inputs)
    row["saved_bytes"]["PEFT LoRA"] = saved_bytes(partial(lora.module, lora.x), [*frozen, lora.A, lora.B])
    row["expected_bytes"] = 4 * cell.M * cell.r
    row["x_bytes"] = inputs.x.nbytes
    return row
