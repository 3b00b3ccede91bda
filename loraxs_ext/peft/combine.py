"""Linear combinations of adapters: sums of R matrices."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.utils import ModulesToSaveWrapper

from loraxs_ext.layers import CoreMatrix, LoraXSLayer

from .config import LoraXSConfig

if TYPE_CHECKING:
    from .model import LoraXSModel


def combine(
    tuner: LoraXSModel, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    """See `LoraXSModel.add_weighted_adapter`."""
    if adapter_name in tuner.peft_config:
        return
    if combination_type not in ("linear", "svd", "cat"):
        raise ValueError(f"combination_type: expected 'linear', 'svd' or 'cat', got {combination_type!r}")
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"weights: expected one per adapter, got {len(weights)} for {len(adapters)} adapters")
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise ValueError(f"adapters: expected names of existing adapters, got {adapter!r}")
        if cast(LoraXSConfig, tuner.peft_config[adapter]).use_edora:
            raise ValueError(
                f"adapters: expected adapters without a magnitude, whose updates are linear in R, got {adapter!r} with "
                f"use_edora=True"
            )
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and sum(name in module.modules_to_save for name in adapters) > 1:
            raise ValueError("adapters: expected at most one with the same modules_to_save, which cannot be summed")

    layers = [m for m in tuner.model.modules() if isinstance(m, LoraXSLayer)]
    ranks = {
        layer.key: max(layer.r[name] for name in adapters if name in layer.r)
        for layer in layers
        if any(name in layer.r for name in adapters)
    }
    rank = max(ranks.values())
    # alpha = r in every module: the scaling of the new adapter is 1, those of the old ones are folded into its R.
    pattern = {f"^{re.escape(key)}": r for key, r in ranks.items() if r != rank}
    configs = cast(dict[str, LoraXSConfig], tuner.peft_config)
    configs[adapter_name] = replace(
        configs[adapters[0]],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_union([configs[name].target_modules for name in adapters]),
        init_weights="zeros",
        # Whatever the parts are made of, their sum is a matrix.
        use_tinylora=False,
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    with torch.no_grad():
        for layer in layers:
            if adapter_name in layer.loraxs_R:
                total = cast(CoreMatrix, layer.core(adapter_name)).weight
                for name, weight in zip(adapters, weights, strict=True):
                    if name in layer.r:
                        layer.settle(name)
                        r = layer.r[name]
                        total[:r, :r] += weight * layer.scaling[name] * layer.get_R(name).to(total)
                total.requires_grad_(False)


def _union(targets: list[Any]) -> set[str] | str:
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({target})" for target in targets)
    if any(isinstance(target, str) for target in targets):
        raise ValueError("target_modules: expected only lists or only strings among the adapters, got both")
    return set().union(*targets)
