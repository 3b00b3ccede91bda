"""What calling a base layer tells of its weight, where the weight cannot be read or passes no gradient on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

# Rows of the identity in one call.
_CHUNK = 256
# Rounding activations to 8 bits turns the output of a linear layer by 1 %, rounding them to bf16 by 0.4 %; a ReLU
# behind it by 70 %.
_LINEAR = 0.05


def probe_weight(base: nn.Module, in_features: int, dtype: torch.dtype, device: torch.device, key: str) -> Tensor:
    """W [N, K] = (f(I) − f(0))ᵀ of the module f in eval mode, checked on random x.

    Args:
        base: f, of x [M, K].
        in_features: K.
        dtype, device: of x.
        key: name of the layer, for messages.

    Raises:
        TypeError: f is not linear up to the rounding of its activations, or does not map [M, K] to [M, N].
    """
    identity = torch.eye(in_features, dtype=dtype, device=device)
    bias = call_frozen(base, torch.zeros_like(identity[:1]), key)
    rows = torch.cat([call_frozen(base, chunk, key) - bias for chunk in identity.split(_CHUNK)])
    x = torch.randn(16, in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found, expected = (call_frozen(base, x, key) - bias).float(), x.float() @ rows.float()
    error = float((found - expected).norm() / found.norm().clamp_min(1e-30))
    if not error <= _LINEAR:
        raise TypeError(
            f"target_modules: {key}: expected a linear layer, got {type(base).__name__}, which is not: its output "
            f"differs from x Wᵀ + f(0) with W = f(I) − f(0) by {error:.2g}, accepted up to {_LINEAR}"
        )
    return rows.mT.contiguous()


def call_frozen(base: nn.Module, x: Tensor, key: str) -> Tensor:
    """f(x) [M, N] of the module f for x [M, K], in eval mode and without gradient.

    Raises:
        TypeError: the result is not of that shape.
    """
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        with torch.no_grad():
            y = base(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(x):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"target_modules: {key}: expected a layer that maps [M, K] to [M, N], got {type(base).__name__}, which "
            f"maps {list(x.shape)} to {got}"
        )
    return y


def pass_gradients(model: nn.Module) -> None:
    """Give the torchao layers of `model` the gradient that x Wᵀ has in x, where they compute without autograd.

    Adapted or not: a gradient that one layer keeps to itself is missing in all layers before it.
    """
    for module in model.modules():
        quantized = type(module._parameters.get("weight")).__module__.startswith("torchao")
        if quantized and _after_forward not in module._forward_hooks.values():
            module.register_forward_hook(_after_forward)


def _after_forward(module: Any, args: tuple[Any, ...], y: Any) -> Any:
    return straight_through(module.weight.dequantize, args[0], y)


def straight_through(read_weight: Callable[[], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """y with the gradient that x Wᵀ has in x, if y was computed from x without autograd; else y as it is.

    Args:
        read_weight: returns W [N, K]; called in the backward pass.
        x: [..., K].
        y: [..., N].
    """
    if y.requires_grad or not (x.requires_grad and torch.is_grad_enabled()):
        return y
    return cast(Tensor, _StraightThrough.apply(x, y, read_weight))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, read_weight: Callable[[], Tensor]) -> Tensor:
        ctx.read_weight, ctx.dtype = read_weight, x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        return (dy @ ctx.read_weight().to(dy.dtype)).to(ctx.dtype), None, None
