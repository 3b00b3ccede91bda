"""Which layer adapts which base layer."""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from loraxs_ext.layers import LoraXSConv, LoraXSEmbedding, LoraXSLinear, LoraXSOpaque

# By the type of the base layer; the first that fits. Any other module has to prove that it is linear.
_LAYERS: tuple[tuple[tuple[type[nn.Module], ...], type[LoraXSLinear]], ...] = (
    ((nn.Linear, Conv1D), LoraXSLinear),
    ((nn.Embedding,), LoraXSEmbedding),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), LoraXSConv),
)


def layer_class(target: nn.Module, key: str, quantization: dict[str, Any]) -> type[LoraXSLinear]:
    """The class of the layer that adapts `target`.

    Args:
        target: the base layer, possibly wrapped by another tuner.
        key: its name, for messages.
        quantization: see `quantization_options`.

    Raises:
        TypeError: no layer can adapt it.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"target_modules: {key}: expected a layer that is called, got the output projection of "
            f"torch.nn.MultiheadAttention, which reads its weight only; name it in exclude_modules"
        )
    backend = resolve_quantization_backend(base, **quantization)
    if backend is not None:
        if backend.layer_type != "linear":
            raise TypeError(f"target_modules: {key}: expected a quantised linear layer, got {type(base).__name__}")
        return LoraXSLinear if backend.supports_merge else LoraXSOpaque
    return next((layer for types, layer in _LAYERS if isinstance(base, types)), LoraXSOpaque)


def quantization_options(model: nn.Module) -> dict[str, Any]:
    """What PEFT's quantisation backends want to know of `model`."""
    return {"get_apply_tensor_subclass": _unknown_scheme, **get_quantization_kwargs(model)}


def _unknown_scheme() -> NoReturn:
    raise TypeError(
        "merge: expected a model quantised through transformers' TorchAoConfig, which tells how to quantise the merged "
        "weights, got one quantised by torchao itself; serve the adapter unmerged, or load the model that way"
    )
