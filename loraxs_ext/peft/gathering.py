"""What an adapter saves, complete and plain, whoever sharded the model it is in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loraxs_ext.basis.distributed import gather, is_sharded
from loraxs_ext.layers import LoraXSLayer

# FSDP1 puts modules of this name between a module and its children; the names in a state dict are without it.
_WRAPPER = "_fsdp_wrapped_module."


def plain_name(name: str) -> str:
    """The name of a module or parameter without what FSDP1 adds to it."""
    return name.replace(_WRAPPER, "")


def adapter_entries(state_dict: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The tensors of `adapter` among those of a model.

    They are found by their own names. PEFT looks for the names of the modules that hold them, which FSDP1 changes, and
    writes an empty adapter.
    """
    return {name: tensor for name, tensor in state_dict.items() if _belongs(name.split("."), adapter)}


def bias_entries(model: nn.Module, state_dict: Mapping[str, Tensor], bias: str) -> dict[str, Tensor]:
    """The biases that are saved with an adapter, by `LoraXSConfig.bias`."""
    if bias == "none":
        return {}
    if bias == "all":
        return {name: tensor for name, tensor in state_dict.items() if name.rpartition(".")[2] == "bias"}
    names = (f"{plain_name(name)}.base_layer.bias" for name, m in model.named_modules() if isinstance(m, LoraXSLayer))
    return {name: state_dict[name] for name in names if name in state_dict}


def gather_adapter(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """What is saved of an adapter, complete and plain, from a model that DDP, FSDP or tensor parallelism distributes.

        state_dict = gather_adapter(model)
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=dist.get_rank() == 0)

    Of the frozen weights nothing is gathered, where the parameters are DTensors. Collective: every process calls it.

    Args:
        model: a PeftModel, wrapped or not.
        adapter: its name.

    Returns:
        R, sketches and whatever else the adapter trains, by their names in the model, on the CPU where they were
        sharded. Under FSDP1, which gathers all weights for it, the first process gets them and the others get nothing.

    Raises:
        ValueError: the model has no such adapter.
    """
    with _complete_under_fsdp1(model):
        state_dict = {plain_name(name).removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
    configs: Any = getattr(unwrapped(model), "peft_config", {})
    if adapter not in configs:
        raise ValueError(f"adapter: expected one of {', '.join(configs) or 'a PeftModel'}, got {adapter!r}")
    kept = {**adapter_entries(state_dict, adapter), **bias_entries(model, state_dict, configs[adapter].bias)}
    wrappers = _trained_completely(model)
    kept |= {name: tensor for name, tensor in state_dict.items() if name.startswith(wrappers)}
    gather_trained(model, kept, kept)
    return kept


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that DDP or FSDP1 wraps."""
    while isinstance(model, DistributedDataParallel) or _is_fsdp1(model):
        model = cast(nn.Module, model.module)
    return model


def gather_trained(model: nn.Module, state_dict: dict[str, Tensor], entries: Collection[str]) -> None:
    """Replace in `state_dict` the DTensors named in `entries`, and those of modules that are trained completely.

    Collective over the processes of the mesh where there is one of them, free where there is none.
    """
    wrappers = _trained_completely(model)
    for name, tensor in state_dict.items():
        if is_sharded(tensor) and (name in entries or name.startswith(wrappers)):
            state_dict[name] = gather(tensor).cpu()


def _belongs(parts: list[str], adapter: str) -> bool:
    holders: Any = LoraXSLayer.adapter_layer_names
    return any(holder in holders and name == adapter for holder, name in zip(parts, parts[1:], strict=False))


def _trained_completely(model: nn.Module) -> tuple[str, ...]:
    """What the names of the tensors of `modules_to_save` begin with."""
    found = (name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    return tuple(f"{plain_name(name).removeprefix('module.')}." for name in found)


def _complete_under_fsdp1(model: nn.Module) -> AbstractContextManager[Any]:
    if not any(map(_is_fsdp1, model.modules())):
        return nullcontext()
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    # What is on the CPU already would be left in the memory that is freed after the gathering.
    elsewhere = any(parameter.device.type != "cpu" for parameter in model.parameters())
    options = FullStateDictConfig(offload_to_cpu=elsewhere, rank0_only=True)
    return FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, options)


def _is_fsdp1(module: nn.Module) -> bool:
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)
