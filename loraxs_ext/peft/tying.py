"""ensure_weight_tying: layers that share the weight of the input embedding share its R as well."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

from peft.tuners.tuners_utils import find_parameter_name_by_module
from torch import nn

from loraxs_ext.layers import LoraXSLayer

from .config import LoraXSConfig


def tie_targets(config: LoraXSConfig, model: nn.Module, tied: Iterable[str]) -> None:
    """Target the input embedding, and let the layers tied to it follow.

    Args:
        config: its `target_modules` name the embedding or a layer tied to it.
        model: with `get_input_embeddings`.
        tied: names of the modules that share the weight of the input embedding.
    """
    config.target_modules_to_tie = sorted(set(tied))
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = find_parameter_name_by_module(model, embedding).removesuffix(".base_layer")
    targets = config.target_modules
    if isinstance(targets, str):
        config.target_modules = rf"(?:{targets}|{re.escape(name)})"
    else:
        own = {t for t in targets or () if not any(key == t or key.endswith(f".{t}") for key in tied)}
        config.target_modules = {*own, name}


def share_core(layer: LoraXSLayer, model: nn.Module, adapter: str) -> None:
    """Replace R of `adapter` in `layer` by that of the input embedding of `model`, with its rank and scaling.

    Raises:
        ValueError: the two do not share one weight, so they have no basis in common.
    """
    source = cast(LoraXSLayer, model.get_input_embeddings())  # type: ignore[operator]
    if source.weight_id != layer.weight_id:
        raise ValueError(
            f"ensure_weight_tying: expected {layer.key} to share the weight of {source.key}, got a weight of its own"
        )
    layer.loraxs_R[adapter] = source.core(adapter)
    for name in ("r", "lora_alpha", "scaling", "initial_scaling", "multiplier"):
        getattr(layer, name)[adapter] = getattr(source, name)[adapter]
