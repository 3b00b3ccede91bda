"""What others offer: PEFT's LoRA and DoRA layers with one adapter, and LoRA with A and B gathered for every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.cells import SEQUENCE, Cell
from benchmarks.gpu.data import SCALE, Inputs, Layer
from benchmarks.gpu.limits import lora_work
from benchmarks.gpu.providers import Factory, Refused, gradients

# torch's grouped matrix product wants rows of 16 bytes.
GROUPED_ALIGNMENT = 16


class PeftLora:
    """peft.tuners.lora.Linear with a trained-looking A and B."""

    dora = False

    def __init__(self, cell: Cell, layer: Layer, inputs: Inputs) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        self.cell, self.layer, self.inputs = cell, layer, inputs
        self.work = lora_work(cell, adapters=1)
        self.x = inputs.x.detach().requires_grad_(cell.backward)
        base = nn.Linear(cell.K, cell.N, bias=False, device="meta")
        base.weight = nn.Parameter(layer.weight, requires_grad=False)
        config = LoraConfig(r=cell.r, lora_alpha=1, init_lora_weights="gaussian", use_dora=self.dora)
        self.module = Linear(base, "default", config=config, r=cell.r)
        modules: Any = self.module
        self.A, self.B = modules.lora_A["default"].weight, modules.lora_B["default"].weight
        with torch.no_grad():
            self.A.normal_(std=cell.K**-0.5)
            self.B.normal_(std=cell.N**-0.5)
        modules.scaling["default"] = SCALE
        self.module.to(dtype=layer.weight.dtype).requires_grad_(False)
        if cell.backward:
            self.module.lora_A.requires_grad_(True)
            self.module.lora_B.requires_grad_(True)
        self.magnitude = self._magnitude()

    def _magnitude(self) -> Tensor | None:
        return None

    def __call__(self) -> tuple[Tensor, ...]:
        y = self.module(self.x)
        return gradients(y, self.inputs.dy, self.x, self.A, self.B) if self.cell.backward else (y,)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, A, B = (t.detach().to(dtype).requires_grad_(self.cell.backward) for t in (self.inputs.x, self.A, self.B))
        W = self.layer.weight.to(dtype)
        y = F.linear(x, W) + SCALE * F.linear(F.linear(x, A), B)
        if self.magnitude is not None:
            # As in DoRA, the norm is a constant of the backward pass; as in PEFT, it is not rounded to a half type.
            wide = torch.promote_types(dtype, torch.float32)
            norm = torch.linalg.norm(W.to(wide) + SCALE * B.detach().to(wide) @ A.detach().to(wide), dim=1)
            y = y * (self.magnitude.to(wide) / norm).to(dtype)
        return gradients(y, self.inputs.dy.to(dtype), x, A, B) if self.cell.backward else (y,)


class PeftDora(PeftLora):
    """The same layer with use_dora=True and a magnitude of its own."""

    dora = True

    def _magnitude(self) -> Tensor:
        modules: Any = self.module
        magnitude = modules.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            magnitude.copy_(torch.rand_like(magnitude) + 0.5)
        return magnitude.detach()


class GatheredLora:
    """LoRA with an A and a B for every slot: torch's best, one gather and two batched products."""

    def __init__(self, cell: Cell, layer: Layer, inputs: Inputs) -> None:
        self.cell, self.layer, self.inputs = cell, layer, inputs
        self.work = lora_work(cell, cell.adapters)
        self.A = layer.weight.new_empty(cell.adapters, cell.r, cell.K).normal_() / cell.K**0.5
        self.B = layer.weight.new_empty(cell.adapters, cell.N, cell.r).normal_() / cell.N**0.5
        assert inputs.slots is not None
        self.slots = inputs.slots.long()
        self._check()

    def _check(self) -> None:
        if self.cell.kind != "decode":
            raise Refused("a gather of A and B for every token of a long batch does not fit any memory")

    def __call__(self) -> tuple[Tensor, ...]:
        p = torch.bmm(self.A[self.slots], self.inputs.x.unsqueeze(-1))
        delta = torch.bmm(self.B[self.slots], p).squeeze(-1)
        return (torch.add(F.linear(self.inputs.x, self.layer.weight), delta, alpha=SCALE),)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = self.inputs.x.to(dtype)
        y = F.linear(x, self.layer.weight.to(dtype))
        for slot in range(self.cell.adapters):
            rows = (self.slots == slot).nonzero().squeeze(-1)
            y[rows] += SCALE * F.linear(F.linear(x[rows], self.A[slot].to(dtype)), self.B[slot].to(dtype))
        return (y,)


class GroupedLora(GatheredLora):
    """The same with torch's grouped matrix product over the sequences of a long batch."""

    def _check(self) -> None:
        cell = self.cell
        aligned = (cell.r * self.A.element_size()) % GROUPED_ALIGNMENT == 0
        if cell.kind != "prefill" or not aligned or not self.A.is_cuda or self.A.dtype != torch.bfloat16:
            raise Refused("torch's grouped product takes bf16 on a GPU, and ranks that fill 16 bytes")
        ends = torch.arange(1, cell.adapters + 1, dtype=torch.int32, device=self.A.device) * SEQUENCE
        self.ends = ends.clamp_max(cell.M)
        self.ends[-1] = cell.M

    def __call__(self) -> tuple[Tensor, ...]:
        p = torch._grouped_mm(self.inputs.x, self.A.mT, offs=self.ends)
        delta = torch._grouped_mm(p, self.B.mT, offs=self.ends)
        return (torch.add(F.linear(self.inputs.x, self.layer.weight), delta, alpha=SCALE),)


class VllmLora(GatheredLora):
    """vLLM's Triton kernels over the same A and B, where that package is installed."""

    def _check(self) -> None:
        try:
            from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
        except ImportError as error:
            raise Refused(f"vLLM's kernels cannot be imported: {error}") from None
        cell, device = self.cell, self.A.device
        self.shrink, self.expand = lora_shrink, lora_expand
        meta = LoRAKernelMeta.make(cell.adapters, cell.M, device=device)
        meta.prepare_tensors(self.slots.to(torch.int32))
        # Later versions take a second argument: whether kernels are specialised to the number of active adapters.
        extra = meta.meta_args.__code__.co_argcount - 2
        self.meta = meta.meta_args(cell.M, *(False,) * extra)
        self.p = torch.empty(1, cell.M, cell.r, dtype=torch.float32, device=device)

    def __call__(self) -> tuple[Tensor, ...]:
        y = F.linear(self.inputs.x, self.layer.weight)
        self.shrink(self.inputs.x, [self.A], self.p, *self.meta, SCALE)
        self.expand(self.p, [self.B], y, *self.meta, offset_start=0, add_inputs=True)
        return (y,)


PEERS: Mapping[str, Factory] = {"PEFT LoRA": PeftLora, "PEFT DoRA": PeftDora}
GATHERED: Mapping[str, Factory] = {
    "gathered LoRA (vLLM)": VllmLora,
    "gathered LoRA (bmm)": GatheredLora,
    "gathered LoRA (grouped)": GroupedLora,
}
