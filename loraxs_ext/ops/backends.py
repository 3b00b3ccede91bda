"""Who owns each op on each device. Nothing is overridden silently: `loraxs doctor` prints this table.

The plain-torch reference is registered for every device. A faster owner takes a device's dispatch key when its part
is built, and is named in `owners()`. The environment variable LORAXS_BACKEND chooses:

- `auto`: owners that were measured to be faster than plain torch on their device;
- `cuda`: also the CUDA kernels, which are compiled and checked in emulation but not measured on a GPU yet;
- `reference`: plain torch for every op.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from . import decode, reference
from .contract import LIBRARY, OPS, UNWRAPPED, check

BACKENDS = ("auto", "cuda", "reference")
BACKEND = os.environ.get("LORAXS_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ValueError(f"LORAXS_BACKEND: expected one of {', '.join(BACKENDS)}, got {BACKEND!r}")

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_OPS_LIBRARY = Path(__file__).parents[1] / "_ops.so"


def _checked(op: str, meaning: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as an owner: the contract is checked first, as the C++ owners do."""
    names = [argument.name for argument in getattr(torch.ops.loraxs, op).default._schema.arguments]
    shaped = [name for name in names if name not in ("scale", "p_drop", "need_dx", "need_dpages")]

    @wraps(meaning)
    def owner(*args: Any, **kwargs: Any) -> Any:
        given = {name: None for name in names} | dict(zip(names, args, strict=False)) | kwargs
        check(op, given["p_drop"] or 0.0, **{name: given[name] for name in shaped})
        _check_slots(op, given["slots"], given["pages"].shape[0])
        # The contract fixes the precision of every sum; autocast must not lower it inside the op.
        with torch.autocast(given["a"].device.type, enabled=False):
            return meaning(*args, **kwargs)

    return owner


def _check_slots(op: str, slots: torch.Tensor | None, n_slots: int) -> None:
    """Slots out of range are refused on the CPU; on a device that check would wait for the device."""
    if slots is None or slots.device.type != "cpu" or slots.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(slots))
    if low < -1 or high >= n_slots:
        bad = low if low < -1 else high
        raise ValueError(f"loraxs::{op}: slots: expected values in [-1, {n_slots}), got {bad}")


def _register() -> bool:
    """Register the reference everywhere and the compiled owners where they are built; True if they are."""
    for op in OPS:
        owner = _checked(op, getattr(reference, op))
        for name in filter(None, (op, UNWRAPPED.get(op))):
            LIBRARY.impl(name, owner, "CompositeExplicitAutograd")
    if BACKEND == "reference":
        return False
    if not _OPS_LIBRARY.exists():
        warnings.warn(
            "loraxs_ext: the compiled ops are not built, every op runs in plain torch; "
            "build them with `pip install --no-build-isolation -e .`",
            stacklevel=2,
        )
        return False
    torch.ops.load_library(str(_OPS_LIBRARY))
    if BACKEND == "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key("loraxs::_linear_decode", "CUDA"):
        first = decode.before(_checked("linear", reference.linear))
        for name in ("linear", UNWRAPPED["linear"]):
            LIBRARY.impl(name, first, "CUDA")
    return True


COMPILED = _register()


def owners() -> dict[str, dict[str, str]]:
    """Who computes each op: {op: {device type: "C++" | "CUDA" | "plain torch"}}, read from torch's dispatcher."""
    return {op: {device: _owner(op, device) for device in _DISPATCH_KEYS} for op in OPS}


def _owner(op: str, device: str) -> str:
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"loraxs::{op}", _DISPATCH_KEYS[device]):
        return {"cpu": "C++", "cuda": "CUDA"}[device]
    return "plain torch"
