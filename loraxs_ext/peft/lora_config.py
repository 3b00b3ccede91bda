"""A LoRA configuration read as one of LoRA-XS: what the reference code trains calls itself LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from .config import LoraXSConfig

_SAME = (
    "r lora_alpha use_rslora target_modules exclude_modules rank_pattern alpha_pattern modules_to_save "
    "trainable_token_indices layers_to_transform layers_pattern fan_in_fan_out task_type inference_mode "
    "base_model_name_or_path revision"
).split()
_RENAMED = {"lora_dropout": "loraxs_dropout", "bias": "bias", "use_dora": "use_edora"}
# They say how A and B of LoRA start or how the process computes, or only matter beside others that are refused.
_WITHOUT_MEANING = {"peft_type", "peft_version", "auto_mapping", "init_lora_weights", "runtime_config"}
# These starts leave the base weights as they are; the others subtract what they put into A and B.
_INNOCENT_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LoraConfig)}


def from_lora(lora: Mapping[str, Any], **changes: Any) -> LoraXSConfig:
    """The LoRA-XS configuration with the fields of a LoRA one: targets, rank, alpha, dropout, heads, DoRA's magnitude.

    Args:
        lora: fields of `peft.LoraConfig`, as `to_dict()` or adapter_config.json has them; absent ones are defaults.
        changes: further fields of `LoraXSConfig`, or other values.

    Raises:
        ValueError: a field asks for what LoRA-XS has no counterpart of, or is out of range; it is named.
        TypeError: a field is of the wrong type.
    """
    start = lora.get("init_lora_weights", True)
    if start not in _INNOCENT_STARTS:
        raise ValueError(
            f"init_lora_weights: expected one of {_INNOCENT_STARTS}, which leave the base weights as they are, "
            f"got {start!r}"
        )
    known = {*_SAME, *_RENAMED, *_WITHOUT_MEANING}
    foreign = {name: value for name, value in lora.items() if name not in known and not _is_neutral(name, value)}
    if foreign:
        raise ValueError(f"LoRA options without a counterpart in LoRA-XS: expected none, got {foreign}")
    fields = {name: lora[name] for name in _SAME if name in lora}
    fields |= {ours: lora[name] for name, ours in _RENAMED.items() if name in lora}
    if fields.get("bias") == "lora_only":
        fields["bias"] = "loraxs_only"
    if isinstance(fields.get("modules_to_save"), (list, tuple, set)):
        # PEFT extends this list in place.
        fields["modules_to_save"] = list(fields["modules_to_save"])
    return LoraXSConfig(**{**fields, **changes})


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a field says nothing: empty, or the default of this version of PEFT."""
    return value is None or value is False or value in ([], {}, "") or value == _DEFAULTS.get(name)
