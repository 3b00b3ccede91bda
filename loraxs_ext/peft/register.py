"""Make PEFT know LoRA-XS: one member more in its closed enum, one entry in its tables."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

NAME = "LORAXS"
# PEFT derives this prefix from the name in several places, without saying so.
PREFIX = "loraxs_"


def _add_member(enum: type[PeftType], name: str) -> PeftType:
    """`enum.<name>` with the value `name`, appended to a str enum that is already closed."""
    member: Any = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(enum.__members__)
    member.__objclass__ = enum
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    if hasattr(enum, "_hashable_values_"):  # Python 3.12.5 and later look values up here first
        enum._hashable_values_.append(name)
    type.__setattr__(enum, name, member)
    return member


PEFT_TYPE: PeftType = PeftType.__members__.get(NAME) or _add_member(PeftType, NAME)


def register(config: type[Any], tuner: type[Any]) -> None:
    """Enter `config` and `tuner` in PEFT's tables; again and again without effect.

    If PEFT has a LoRA-XS of its own, a warning says so and ours takes its place in this process: the two would not
    understand each other's files.
    """
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(PEFT_TYPE)
    if known is tuner:
        return
    if known is not None and known.__module__ != tuner.__module__:
        warnings.warn(
            f"PEFT ships a method named {NAME} ({known.__module__}). In this process, loraxs_ext replaces it; adapters "
            f"saved by the two are not interchangeable.",
            stacklevel=2,
        )
    if known is not None:
        for table in (PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            table.pop(PEFT_TYPE, None)
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=tuner, prefix=PREFIX)
    # What hotswap must find equal because it only exchanges tensors and the scaling.
    keys = ["r", "rank_pattern", "use_rslora", "alpha_pattern", "loraxs_dropout", "sigma", "vectors", "save_basis"]
    relatives = ["use_edora", "edora_norm", "use_tinylora", "u", "weight_tying", "save_projection"]
    CONFIG_KEYS_TO_CHECK[PEFT_TYPE] = [*keys, *relatives]
