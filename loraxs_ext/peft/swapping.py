"""What PEFT's hotswap leaves undone: the scaling of layers with a pattern of their own, and alpha in the configuration.

hotswap writes alpha / r of the new configuration into every layer. It looks patterns up by the names of tensors, which
end otherwise than those of modules, so it finds none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft.utils.other import get_pattern_key

from loraxs_ext.layers import LoraXSLayer

from .config import LoraXSConfig


def settle_scaling(config: LoraXSConfig, layers: Sequence[LoraXSLayer], adapter: str) -> None:
    """Give every layer the scaling that belongs to the alpha a hot swap brought, and note that in `config`.

    Free of effect where there was no swap: scalings that somebody wrote by hand, layer by layer, stay.

    Args:
        config: of the adapter; ranks and patterns are those of what was swapped in, or PEFT would have refused it.
        layers: those that have the adapter.
        adapter: its name.
    """
    written = {layer.scaling[adapter] for layer in layers if layer.is_rescaled(adapter)}
    if len(written) != 1:
        return
    (scaling,) = written
    alpha = float(f"{scaling * _divisor(config, config.r):.12g}")
    alpha = config.lora_alpha if math.isclose(alpha, config.lora_alpha) else alpha
    wanted = {layer: _scaling(config, layer, alpha) for layer in layers}
    for layer, (_, own) in wanted.items():
        # A layer that the new adapter lacks keeps its scaling, and has an R of zeros.
        if layer.scaling[adapter] not in (scaling, own) and layer.core(adapter).on_basis.any():
            return
    config.lora_alpha = alpha
    for layer, (own_alpha, own) in wanted.items():
        layer.set_alpha(adapter, own_alpha, own)


def _scaling(config: LoraXSConfig, layer: LoraXSLayer, lora_alpha: float) -> tuple[float, float]:
    """Alpha and scaling of a layer, for the alpha of layers without a pattern."""
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    r = ranks.get(get_pattern_key(list(ranks), layer.key), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), layer.key), lora_alpha)
    return alpha, alpha / _divisor(config, r)


def _divisor(config: LoraXSConfig, r: int) -> float:
    return math.sqrt(r) if config.use_rslora else r
