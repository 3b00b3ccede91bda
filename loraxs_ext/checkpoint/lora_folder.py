"""A plain PEFT LoRA in a folder, read without trusting it and without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraxs_ext.peft.patterns import check_patterns

from .streaming import ADAPTER_WEIGHTS, read_adapter_config

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
# Fields of LoraConfig that do not change what a stored adapter means, or that are read here. Any other one that is set
# may mean anything.
_KNOWN = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out"),
    *("lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "megatron_core"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# Initialisations that leave the base weights as they are. Others subtract the initial adapter from them.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


class LoraModule(NamedTuple):
    """ΔW = scale · b a of one module: a [k, K], b [N, k], as stored."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA as it is stored.

    Attributes:
        fields: of adapter_config.json.
        modules: by name of the module in the base model.
        others: other tensors under their stored names: heads.
    """

    fields: Mapping[str, Any]
    modules: dict[str, LoraModule]
    others: dict[str, Tensor]


def read_lora(folder: Path) -> LoraFolder:
    """The LoRA in `folder`.

    Raises:
        ValueError: it is none, it is damaged, or of a variant that is more than ΔW = s·B A; names the field or tensor.
    """
    fields = read_adapter_config(folder)
    _check_fields(fields, folder)
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                match = _FACTOR.fullmatch(name)
                if match and match[1].startswith(_PREFIX):
                    factors.setdefault(match[1].removeprefix(_PREFIX), {})[match[2]] = file.get_tensor(name)
                elif ".lora_" in name or not name.startswith(_PREFIX):
                    raise ValueError(f"{folder}: expected lora_A and lora_B of linear layers, got the tensor {name}")
                else:
                    others[name] = file.get_tensor(name)
    except SafetensorError as reason:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} is damaged: {reason}") from None
    if not factors:
        raise ValueError(f"{folder} must hold lora_A and lora_B of some modules, got none")
    try:
        check_patterns({name: fields.get(name) for name in ("rank_pattern", "alpha_pattern")}, factors)
    except ValueError as reason:
        raise ValueError(f"{folder}: {reason}") from None
    modules = {name: _module(name, parts, fields, folder) for name, parts in factors.items()}
    return LoraFolder(fields, modules, others)


def _module(name: str, parts: Mapping[str, Tensor], fields: Mapping[str, Any], folder: Path) -> LoraModule:
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None:
        raise ValueError(f"{folder}: {name}: expected lora_A and lora_B, got one of them")
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), fields["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), name), fields["lora_alpha"])
    shapes = f"{list(a.shape)} and {list(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
        raise ValueError(f"{folder}: {name}: expected lora_A [{rank}, K] and lora_B [N, {rank}], got {shapes}")
    for part in (a, b):
        if not part.is_floating_point() or not part.isfinite().all():
            raise ValueError(f"{folder}: {name}: expected finite floating-point factors, got others")
    return LoraModule(a, b, alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank))


def _check_fields(fields: Mapping[str, Any], folder: Path) -> None:
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type: expected 'LORA', got {fields.get('peft_type')!r}")
    for name, value in fields.items():
        if name not in _KNOWN and value:
            hint = "; DoRA's magnitudes have no place in a LoRA-XS adapter" if name == "use_dora" else ""
            raise ValueError(f"{folder}: {name}: expected a plain LoRA without it, got {value!r}{hint}")
    if fields.get("init_lora_weights", True) not in _INITIAL:
        raise ValueError(
            f"{folder}: init_lora_weights: expected one that leaves the base weights alone, got "
            f"{fields['init_lora_weights']!r}; save it with path_initial_model_for_weight_conversion"
        )
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{folder}: bias: expected 'none', got {fields['bias']!r}")
    patterns = [fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}]
    for name, values in (("rank_pattern", patterns[0]), ("alpha_pattern", patterns[1])):
        if not isinstance(values, dict):
            raise ValueError(f"{folder}: {name}: expected numbers by name of module, got {values!r}")
    for name, rank in [("r", fields.get("r")), *patterns[0].items()]:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{folder}: rank of {name}: expected a positive integer, got {rank!r}")
    for name, alpha in [("lora_alpha", fields.get("lora_alpha")), *patterns[1].items()]:
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"{folder}: alpha of {name}: expected a number, got {alpha!r}")


def delta_norm(module: LoraModule) -> float:
    """‖ΔW‖, from k × k Gram matrices in fp64."""
    a, b = module.a.double(), module.b.double()
    return abs(module.scale) * math.sqrt(max(float(torch.sum((b.mT @ b) * (a @ a.mT))), 0.0))
