"""The owners of the ops by name, so that each can be tested and timed whoever the dispatcher would choose.

An owner is a function with the arguments of the contract (`loraxs_ext/ops/contract.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraxs_ext import ops
from loraxs_ext.ops import decode

DISPATCHER = "loraxs"
PLAIN_TORCH = "plain torch"
TRITON = "Triton"
TRITON_CUBLAS = "Triton + cuBLAS"
CONCATENATED = "cuBLAS [x | q]"
CUDA = "CUDA"
OWNERS = (DISPATCHER, PLAIN_TORCH, TRITON, TRITON_CUBLAS, CONCATENATED, CUDA)

_TRITON = "loraxs_ext.ops.triton"
# What an owner of the Triton floor is told beyond the contract: which product to use, by op.
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    TRITON_CUBLAS: {
        "linear": {"product": "expanded"},
        "linear_projected": {"product": "expanded"},
        "linear_backward": {"fuse_base": False},
    },
    CONCATENATED: {"linear": {"product": "concatenated"}, "linear_projected": {"product": "concatenated"}},
}


class NotBuilt(LookupError):
    """The owner does not compute this op, or this call of it; the message says why."""


def find(owner: str, op: str) -> Callable[..., Any]:
    """The function by which `owner` computes `op`; "loraxs" is what the dispatcher chooses for the device.

    Raises:
        NotBuilt: this owner has no such op, or its compiler is not installed. The function itself raises it for a call
            that the owner leaves to others.
    """
    if owner == DISPATCHER:
        return getattr(torch.ops.loraxs, ops.contract.UNWRAPPED.get(op, op)).default
    if owner == PLAIN_TORCH:
        return getattr(ops.reference, op)
    if owner == CUDA:
        return _cuda(op)
    options = _OPTIONS.get(owner, {}).get(op)
    if op not in ops.backends.TRITON_OPS or (owner != TRITON and options is None):
        raise NotBuilt(f"{owner} does not compute {op} in a way of its own")
    function = getattr(_module(owner, ops.backends.TRITON_OPS[op]), op)
    if options and "product" in options:
        return partial(function, product=getattr(_module(owner, "cublas"), options["product"]))
    return partial(function, **options) if options else function


def differs_from_triton(owner: str, M: int) -> bool:
    """Whether `owner` runs something else than Triton's own kernels: few tokens leave nothing to choose."""
    return owner not in _OPTIONS or M > _module(owner, "decode").MAX_TOKENS


def laid_out(owner: str, weight: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """weight and b as `owner` wants them in memory."""
    return _module(owner, "cublas").lay_out(weight, b) if owner == CONCATENATED else (weight, b)


def _cuda(op: str) -> Callable[..., Any]:
    """The kernels of csrc/cuda: those for few tokens have an op of their own, add_delta_ is registered if asked for."""
    if op == "linear" and torch._C._dispatch_has_kernel_for_dispatch_key("loraxs::_linear_decode", "CUDA"):
        return _linear_decode
    if op == "add_delta_" and ops.backends.owners()[op]["cuda"] == CUDA:
        return torch.ops.loraxs.add_delta_.default
    raise NotBuilt(f"{CUDA} does not compute {op} in this build, or not without LORAXS_BACKEND=cuda")


def _linear_decode(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, *others: Any) -> Any:
    p_drop = others[4] if len(others) > 4 else 0.0
    if not (x.is_cuda and decode.takes(x, weight, a, p_drop)):
        raise NotBuilt(f"{CUDA} does not take x {list(x.shape)} with r = {a.shape[0]} and p_drop = {p_drop}")
    return torch.ops.loraxs._linear_decode.default(x, weight, bias, a, *others)


def _module(owner: str, file: str) -> Any:
    try:
        return importlib.import_module(f"{_TRITON}.{file}")
    except ImportError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        raise NotBuilt(f"{owner} needs Triton: {error}") from None
