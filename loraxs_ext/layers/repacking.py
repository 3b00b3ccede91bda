"""bitsandbytes' 4-bit weights on CPUs with AVX512-BF16, which it repacks at the first forward pass in eval mode.

A repacked weight is several times faster for a few tokens, so it stays that way for inference. But it cannot be
dequantised, passes no gradient on to x, and `state_dict` restores its scales in another order than they came in: a
model that is saved after an evaluation computes something else from then on. So the layers of an adapted model go back
to the original layout wherever that matters; the next forward pass in eval mode repacks them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

# Where a quant state keeps what it was before repacking: in itself, so that it goes where the weight goes.
_ORIGINAL = "loraxs_original"


def guard_packed_weights(model: nn.Module) -> None:
    """Make every 4-bit layer of `model` unpack itself before it has to pass a gradient on, or is saved.

    Adapted or not: a gradient that one layer keeps to itself is missing in all layers before it.
    """
    for module in model.modules():
        if type(getattr(module, "weight", None)).__name__ != "Params4bit":
            continue
        if _before_forward not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before_forward)
            module.register_state_dict_pre_hook(_before_saving)


def is_repacked(base: Any) -> bool:
    """Whether the weight of `base` is in the layout that cannot be dequantised."""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def unpack(base: Any) -> None:
    """Put the weight of `base` back into its original layout.

    Bit for bit where `guard_packed_weights` saw it before it was repacked. Else the scales are those of the repacked
    weight, rounded to bf16: W as the layer computes with it, within 0.4 % of the W that was quantised.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = base.weight.quant_state
    # Scales are restored below; those that were quantised themselves would be so once more.
    state.original_nested = False
    # Changes the state in place, as is done below: the module holds on to the same object.
    base.weight.data, _ = _convert_weight_packed_for_cpu_inverse(base.weight.data, state)
    if hasattr(state, _ORIGINAL):
        vars(state).update(vars(getattr(state, _ORIGINAL)))
    else:
        state.absmax = state.absmax.mT.reshape(-1).float()


def _before_forward(base: Any, args: tuple[Any, ...]) -> None:
    if is_repacked(base):
        # In training mode even where no gradient is wanted: it would not have been repacked there.
        if base.training or (torch.is_grad_enabled() and args and args[0].requires_grad):
            unpack(base)
        return
    state = getattr(base.weight, "quant_state", None)
    if state is not None and not hasattr(state, _ORIGINAL):
        setattr(state, _ORIGINAL, copy.copy(state))


def _before_saving(base: Any, prefix: str, keep_vars: bool) -> None:
    if is_repacked(base):
        unpack(base)
