"""A rank for every module, written as the fields of a LoraXSConfig."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from peft.utils.other import get_pattern_key

from loraxs_ext.peft import LoraXSConfig

_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")


def with_ranks(config: LoraXSConfig, ranks: Mapping[str, int]) -> LoraXSConfig:
    """`config` with the given rank in every module and the scaling that it had: s = alpha / r (or alpha / √r) is kept.

    `r` becomes the most frequent rank, and the patterns name what differs. Where all modules are adapted, the targets
    stay as they are; otherwise they become the list of adapted modules.

    Args:
        config: targets, scaling and recipe.
        ranks: by name, of all modules that `config` targets; 0 for those not to be adapted.

    Raises:
        ValueError: no rank is above 0.
    """
    kept = {name: rank for name, rank in ranks.items() if rank > 0}
    if not kept:
        raise ValueError(f"ranks: expected at least one above 0, got {dict(ranks)}")
    # Of equally frequent ranks the first.
    r = Counter(kept.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in kept.items() if rank != r}
    scaling = config.lora_alpha / _divisor(config, config.r)

    def pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
        meant = {name: values.get(name, default) for name in kept}
        # PEFT also takes a name as the end of a longer one, and its dots as any character.
        plain = dict(values)
        if all(plain.get(get_pattern_key(list(plain), name), default) == value for name, value in meant.items()):
            return plain
        return {f"^{re.escape(name)}": value for name, value in values.items()}

    def alpha(rank: int) -> float:
        return scaling * _divisor(config, rank)

    changed = replace(
        config,
        r=r,
        lora_alpha=alpha(r),
        rank_pattern=pattern(other, r),
        alpha_pattern=pattern({name: alpha(rank) for name, rank in other.items()}, alpha(r)),
    )
    return changed if len(kept) == len(ranks) else replace(changed, **_only(kept, ranks))


def _only(kept: Iterable[str], known: Iterable[str]) -> dict[str, Any]:
    """Targets that are the modules `kept` and no other of those known."""
    targets: list[str] | str = list(kept)
    left_out = set(known) - set(targets)
    # PEFT also takes a listed name as the end of a longer one.
    if any(other.endswith(f".{name}") for name in targets for other in left_out):
        targets = "|".join(re.escape(name) for name in targets)
    return {"target_modules": targets, "layers_to_transform": None, "layers_pattern": None}


def _divisor(config: LoraXSConfig, rank: int) -> float:
    return math.sqrt(rank) if config.use_rslora else rank


def snippet(config: LoraXSConfig) -> dict[str, Any]:
    """What of `config` says where which rank sits, as JSON-ready arguments of LoraXSConfig; defaults are left out."""
    defaults = {field.name: getattr(LoraXSConfig(), field.name) for field in fields(LoraXSConfig)}
    values = {name: getattr(config, name) for name in _FIELDS}
    found = {k: v for k, v in values.items() if k in ("r", "lora_alpha") or (v and v != defaults[k])}
    return {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in found.items()}
