"""A tiny decoder, trained in one process and in every way of spreading it over several; run by each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.tensor_parallel import TensorParallelLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from loraxs_ext.basis import across_ranks
from loraxs_ext.peft import LoraXSConfig, gather_adapter

STEPS, MICRO_BATCHES, ROWS, LENGTH, VOCABULARY = 3, 2, 4, 6, 50
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "LoRA-XS": {},
    "EDoRA": {"use_edora": True, "edora_norm": "differentiated"},
    "TinyLoRA": {"use_tinylora": True, "u": 3, "weight_tying": 0.5},
}


# A width that two processes can't halve, where transformers divides such.
INTERMEDIATE = 49 if hasattr(TensorParallelLayer, "_from_local_last_dim_shard") else 48


def save_base(folder: Path) -> None:
    """Biases everywhere, which must be added once."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = {
        "intermediate_size": INTERMEDIATE,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name and "norm" not in name:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)


def config(kind: str, **changes: Any) -> LoraXSConfig:
    options = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "init_weights": False}
    return LoraXSConfig(**{**options, **KINDS[kind], **changes})


def batches() -> Tensor:
    """Token ids [steps, micro-batches, rows, length], the same in every step so that the loss falls."""
    size = (1, MICRO_BATCHES, ROWS, LENGTH)
    ids = torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(1))
    return ids.expand(STEPS, *size[1:])


def load_base(folder: Path, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **options)
    return base if options else base.to(device)


def spread_ddp(model: nn.Module, device: str) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=False)


def spread_fsdp2(model: nn.Module, device: str, **policies: Any) -> nn.Module:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


def spread_fsdp1(model: nn.Module, device: str) -> nn.Module:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device(device)
    )


class Way(NamedTuple):
    """How a model is spread.

    Attributes:
        spread: of an adapted model.
        shares_rows: whether processes train on different rows.
        base: further arguments of `from_pretrained`.
        kinds: what is trained that way.
        dtype: of the frozen weights.
    """

    spread: Callable[[nn.Module, str], nn.Module]
    shares_rows: bool = True
    base: Callable[[], dict[str, Any]] = dict
    kinds: tuple[str, ...] = tuple(KINDS)
    dtype: torch.dtype = torch.float32


def _offloaded(model: nn.Module, device: str) -> nn.Module:
    return spread_fsdp2(model, device, offload_policy=CPUOffloadPolicy(pin_memory=device != "cpu"))


def _mixed(model: nn.Module, device: str) -> nn.Module:
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return spread_fsdp2(model, device, mp_policy=precision)


ALONE = Way(lambda model, device: model, shares_rows=False)
WAYS = {
    "DDP": Way(spread_ddp),
    "FSDP2": Way(spread_fsdp2),
    "TP": Way(
        lambda model, device: model,
        shares_rows=False,
        base=lambda: {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())},
    ),
    "FSDP1": Way(spread_fsdp1, kinds=("LoRA-XS", "EDoRA")),
    "FSDP2 offloaded": Way(_offloaded, kinds=("LoRA-XS",)),
    "FSDP2 bf16": Way(spread_fsdp2, kinds=("LoRA-XS",), dtype=torch.bfloat16),
    "FSDP2 mixed": Way(_mixed, kinds=("LoRA-XS",)),
}


def train(folder: Path, way: Way, kind: str, device: str) -> tuple[nn.Module, list[float]]:
    """The model trained on this process's share of the rows, and the loss of every step over all rows."""
    base = load_base(folder / "base", device, way.dtype, **way.base())
    with across_ranks() if dist.is_initialized() else nullcontext():
        adapted = get_peft_model(base, config(kind))
    model = way.spread(adapted, device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    parts, part = (dist.get_world_size(), dist.get_rank()) if way.shares_rows else (1, 0)
    losses = []
    for step in batches().to(device):
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for i, ids in enumerate(step.chunk(parts, dim=1)[part]):
            with _without_reduction(model) if i + 1 < MICRO_BATCHES else nullcontext():
                loss = model(input_ids=ids, labels=ids).loss / MICRO_BATCHES
                loss.backward()
            total += loss.detach().float()
        optimizer.step()
        if way.shares_rows:
            dist.all_reduce(total)
        losses.append(float(total) / parts)
    return model, losses


@contextmanager
def _fsdp2_without_reduction(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def _without_reduction(model: Any) -> AbstractContextManager[None]:
    if hasattr(model, "set_requires_gradient_sync"):
        return _fsdp2_without_reduction(model)
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()


def run(folder: Path, names: list[str], device: str, adapters: Path) -> dict[str, Any]:
    """Train in the ways `names`; the adapters are saved in adapters/<way>/<kind>."""
    results: dict[str, Any] = {}
    for name in names:
        for kind in WAYS[name].kinds:
            model, losses = train(folder, WAYS[name], kind, device)
            state = gather_adapter(model)
            inner = model.module if isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)) else model
            place = adapters / name / kind
            inner.save_pretrained(str(place), state_dict=state, is_main_process=dist.get_rank() == 0)
            values = {key: value.detach().float().cpu() for key, value in state.items()}
            results[f"{name}, {kind}"] = {"losses": losses, "values": values}
    return results


def serve(folder: Path, adapter: Path, ids: Tensor, device: str) -> Tensor:
    """Logits of one process with a saved adapter."""
    model = PeftModel.from_pretrained(load_base(folder / "base", device), adapter).eval()
    with torch.no_grad():
        return model(input_ids=ids.to(device)).logits.float().cpu()
