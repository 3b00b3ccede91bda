"""What the adapters of a source stand on: told by the source itself, or by a configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from loraxs_ext.basis import Recipe
from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.store import RowSource

from .placing import Footing

_MIXED = "load them into a PeftModel, whose adapters loraxs_ext.adapters mixes as well"
# Fields of a configuration that say that R is not all of an adapter, each with what to do then.
_MORE_THAN_R = {
    "use_edora": _MIXED,
    "modules_to_save": _MIXED,
    "trainable_token_indices": _MIXED,
    "ensure_weight_tying": _MIXED,
    "target_parameters": "load them into a PeftModel and choose one for the whole batch by set_adapter",
}


def footing_of(source: RowSource, model: nn.Module, config: LoraXSConfig | None) -> Footing:
    """The footing of the adapters of `source` in `model`.

    Args:
        source: a store tells it by its manifest; other sources need `config`, or a model that has LoRA-XS layers.
        model: the transformers model itself.
        config: targets, ranks and recipe for a source without a manifest; `basis_check`, `basis_tol` and `basis_file`
            for any.

    Raises:
        ValueError: nothing tells it, or the adapters are more than R.
    """
    manifest: Any = getattr(source, "manifest", None)
    checks: dict[str, Any] = {}
    if config is not None:
        _refuse_more_than_r("adapter_config", vars(config))
        checks = {"check": config.basis_check, "tol": config.basis_tol, "basis_file": config.basis_file}
    if manifest is not None:
        _refuse_more_than_r("source", manifest.config)
        recipe = Recipe.from_dict(manifest.recipe)
        if config is not None and config.recipe() != recipe:
            raise ValueError(f"adapter_config: expected the recipe of the source, {recipe}, got {config.recipe()}")
        return Footing(recipe, manifest.ranks, manifest.sketches, **checks)
    if config is not None:
        return Footing(config.recipe(), _targets(model, config), **checks)
    return _footing_of_layers(model)


def _refuse_more_than_r(argument: str, fields: Mapping[str, Any]) -> None:
    for name, advice in _MORE_THAN_R.items():
        if fields.get(name):
            raise ValueError(f"{argument}: expected adapters that are R alone, got {name}={fields[name]!r}; {advice}")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{argument}: expected adapters that are R alone, got bias={fields['bias']!r}")


def _targets(model: nn.Module, config: LoraXSConfig) -> dict[str, int]:
    """Rank by module, for what `get_peft_model(model, config)` would adapt."""
    config = copy.copy(config)
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(kind))
        if known is None:
            raise ValueError(f"adapter_config: target_modules: expected names for a model of type {kind!r}, got None")
        config.target_modules = set(known)
    _maybe_include_all_linear_layers(config, model)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraXSLayer))
    patterns = config.rank_pattern
    return {
        name: patterns.get(get_pattern_key(list(patterns), name), config.r)
        for name, _ in model.named_modules()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    }


def _footing_of_layers(model: nn.Module) -> Footing:
    """That of the adapters which the model has."""
    layers = [module for module in model.modules() if isinstance(module, LoraXSLayer) and module.r]
    policies: list[Any] = [policy for layer in layers for policy in layer.basis_policy.values()]
    if not policies:
        raise ValueError(
            f"adapter_config: expected a LoraXSConfig, because {type(model).__name__} has no LoRA-XS layers and the "
            f"source has no manifest, got None"
        )
    return Footing(policies[0].recipe, {layer.key: max(layer.r.values()) for layer in layers})
