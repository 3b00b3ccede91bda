"""The CUDA kernels for few tokens as the first owner of `linear` on GPUs; what they do not take goes on to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def before(owner: Callable[..., Any]) -> Callable[..., Any]:
    """The owner of `linear` that asks `takes` and calls `loraxs::_linear_decode`, or else `owner`."""

    @wraps(owner)
    def first(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        pages: Tensor,
        slots: Tensor | None,
        scale: float,
        p_drop: float = 0.0,
        rng: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        compute = torch.ops.loraxs._linear_decode if takes(x, weight, a, p_drop) else owner
        return compute(x, weight, bias, a, b, pages, slots, scale, p_drop, rng)

    return first


def takes(x: Tensor, weight: Tensor, a: Tensor, p_drop: float) -> bool:
    """Whether the CUDA kernels compute this call of `linear`.

    Half types without dropout, on devices of capability 8, 9 and 10 that this build has machine code for. By
    csrc/kernels/linear_decode_plan.h: K a multiple of 8 and M <= 64 with r <= 16, M <= 16 with r <= 32, or from 9.0 on
    M <= 128 with r <= 128.
    """
    if p_drop or x.dtype not in _HALF or x.numel() == 0 or not x.dim() or weight.dim() != 2 or a.dim() != 2:
        return False
    K = x.shape[-1]
    return _fits()(x.numel() // K, weight.shape[0], K, a.shape[0], _capability(x.device.index))


@cache
def _fits() -> Callable[[int, int, int, int, int], bool]:
    return import_module("loraxs_ext._C").linear_decode_fits


@cache
def _capability(index: int) -> int:
    """Major compute capability of the GPU; 0 if this build has no machine code for it."""
    major, minor = torch.cuda.get_device_capability(index)
    return major if runs_on(major, minor, import_module("loraxs_ext._C").build_info()["cuda_archs"]) else 0


def runs_on(major: int, minor: int, archs: list[str]) -> bool:
    """Whether machine code for `archs` ("80", "90a") has some that runs on a GPU of capability `major`.`minor`.

    Code runs on later minor versions of its major version; code with a letter on its own version only.
    """
    built = [(int(arch.rstrip("af")), arch[-1].isalpha()) for arch in archs]
    return any(
        divmod(number, 10) == (major, minor) if exact else number // 10 == major and number % 10 <= minor
        for number, exact in built
    )
