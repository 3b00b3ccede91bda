"""LoRA-XS → plain PEFT LoRA: lora_A = s·R A, lora_B = B, exactly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from loraxs_ext.files import atomic_folder
from loraxs_ext.files.safetensors import FLOATS
from loraxs_ext.layers import LoraXSLayer, LoraXSLinear
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.transport import relative_distance

from .streaming import ADAPTER_WEIGHTS, StreamedModel

# Rounding ΔW's factors to bf16 changes it by 3e-3.
_ROUNDING_WORTH_A_WARNING = 0.02
_PREFIX = "base_model.model."
# Fields that LoraConfig has under the same name and with the same meaning.
_SAME = (
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices"),
)


def to_lora(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a plain LoRA that stock PEFT, vLLM and others load: lora_A = s·R A, lora_B = B, alpha = r.

    The same ΔW, and a file of LoRA's size. The scaling is folded in, so that alpha / r is 1 in every module, whatever
    its rank. A trained magnitude makes it a DoRA. Heads and biases come along.

    Args:
        model: with the adapter.
        folder: to be made; it appears whole or not at all.
        adapter_name: which adapter.
        dtype: of lora_A and lora_B: fp32, bf16 or fp16.
        overwrite: replace an adapter that is there.

    Raises:
        ValueError: there is no such adapter, or a number is beyond the range of `dtype`.
        TypeError: a layer of another kind than linear has the adapter.
        FileExistsError: `folder` exists.

    Warns:
        UserWarning: rounding to `dtype` changes an update noticeably.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, LoraXSConfig):
        raise ValueError(f"adapter_name: expected the name of a LoRA-XS adapter, got {adapter_name!r}")
    layers = [module for module in model.modules() if isinstance(module, LoraXSLayer)]
    factors = ((m.key, lora_factors(m, adapter_name)) for m in layers if adapter_name in m.loraxs_R)
    others = get_peft_model_state_dict(model, adapter_name=adapter_name)
    write_lora(config, factors, others, Path(folder), dtype=dtype, overwrite=overwrite)


def export_lora(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """`to_lora` from folder to folder, one base weight at a time; R is verified as in loading.

    Raises:
        ValueError, TypeError, FileExistsError: as `to_lora`; nothing is written then.
    """
    model = StreamedModel.open(base, adapter)
    try:
        config = cast(LoraXSConfig, model.model.peft_config[model.adapter])
        factors = ((layer.key, lora_factors(layer, model.adapter)) for layer in model.visit(progress=progress))
        write_lora(config, factors, model.others, output, dtype=dtype, overwrite=overwrite)
    finally:
        model.close()


def write_lora(
    config: LoraXSConfig,
    factors: Iterable[tuple[str, dict[str, Tensor]]],
    others: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write the folder of a plain LoRA, whole or not at all.

    Args:
        config: of the LoRA-XS adapter.
        factors: by module key, what `lora_factors` returns.
        others: what else the adapter stores, under its stored names.
        folder, dtype, overwrite: as `to_lora`.

    Raises:
        ValueError, FileExistsError: as `to_lora`.
        BlockingIOError: another process or thread is writing the folder.
    """
    if dtype not in FLOATS.values():
        raise ValueError(f"dtype: expected fp32, bf16 or fp16, got {dtype}")
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        worst = 0.0
        for key, parts in factors:
            rounded = {name: part.to(dtype) for name, part in parts.items()}
            if not all(part.isfinite().all() for part in rounded.values()):
                raise ValueError(f"{key}: expected an update that {dtype} can hold, got one beyond its range")
            worst = max(worst, _rounding(parts, rounded))
            ranks[key] = len(parts["lora_A.weight"])
            tensors |= {f"{_PREFIX}{key}.{name}": part for name, part in rounded.items()}
        # PEFT stores an adapted output embedding a second time.
        unwanted = (".loraxs_", ".base_layer.weight")
        tensors |= {name: part.cpu() for name, part in others.items() if not any(x in name for x in unwanted)}
        save_file(
            {name: part.contiguous() for name, part in tensors.items()}, temporary / ADAPTER_WEIGHTS, {"format": "pt"}
        )
        dora = any(name.endswith(".lora_magnitude_vector") for name in tensors)
        lora_config(config, ranks, use_dora=dora).save_pretrained(str(temporary))
    if worst > _ROUNDING_WORTH_A_WARNING:
        warnings.warn(f"dtype: rounding to {dtype} changes the adapter's update by {worst:.1%}", stacklevel=3)


@torch.no_grad()
def lora_factors(layer: LoraXSLayer, adapter: str) -> dict[str, Tensor]:
    """What PEFT's LoRA would store for this layer, in fp32 (fp64 for an fp64 base), on the CPU.

    Returns:
        lora_A.weight [r, K] = s·R A and lora_B.weight [N, r] = B; lora_magnitude_vector [N] where there is a magnitude.

    Raises:
        TypeError: the layer is not linear.
    """
    if type(layer) is not LoraXSLinear:
        raise TypeError(f"{layer.key}: expected a linear layer, got {type(layer).__name__}")
    layer.settle(adapter)
    a, b = layer.get_basis(adapter)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    scaled = layer.get_R(adapter).to(dtype) * layer.scaling[adapter]
    parts = {"lora_A.weight": scaled @ a.to(dtype), "lora_B.weight": b.to(dtype)}
    magnitude: Any = getattr(layer, "loraxs_magnitude", {})
    if adapter in magnitude:
        parts["lora_magnitude_vector"] = magnitude[adapter].weight.to(dtype)
    return {name: part.detach().cpu() for name, part in parts.items()}


def lora_config(config: LoraXSConfig, ranks: dict[str, int], *, use_dora: bool = False) -> LoraConfig:
    """The configuration of the exported LoRA: alpha = r in every module.

    Args:
        config: of the adapter.
        ranks: of its modules.
        use_dora: whether it has magnitudes.
    """
    rank = max(ranks.values())
    pattern = {f"^{re.escape(key)}": r for key, r in ranks.items() if r != rank}
    same: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        bias=cast(Any, "lora_only" if config.bias == "loraxs_only" else config.bias),
        use_dora=use_dora,
        inference_mode=True,
        **same,
    )


def _rounding(parts: dict[str, Tensor], rounded: dict[str, Tensor]) -> float:
    """Relative change of ΔW."""
    first, second = (
        (p["lora_A.weight"], torch.eye(len(p["lora_A.weight"])), p["lora_B.weight"].mT) for p in (parts, rounded)
    )
    return relative_distance(first, second)
