"""Who owns each op on each device. Nothing is overridden silently: `loraxs doctor` prints this table.

The plain-torch reference is registered for every device. A faster owner takes a device's dispatch key when its part
is built, and is named in `owners()`. The environment variable LORAXS_BACKEND chooses:

- `auto`: C++ on the CPU, Triton on GPUs, each where it is there and can run;
- `triton`: Triton's own kernels on GPUs, without leaving base products to cuBLAS; an error where they cannot run;
- `cuda`: as `auto`, and the C++ CUDA kernels before Triton's;
- `reference`: plain torch for every op.

The GPU owners are compiled for their targets and checked in emulation; no GPU has run or timed them yet.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import contract, decode, eigh, reference
from .contract import LIBRARY, OPS, UNWRAPPED, check, table_of, tensors_of
from .orthonormal import COMPILED_ROWS

BACKENDS = ("auto", "triton", "cuda", "reference")
BACKEND = os.environ.get("LORAXS_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ValueError(f"LORAXS_BACKEND: expected one of {', '.join(BACKENDS)}, got {BACKEND!r}")

_OPS_LIBRARY = Path(__file__).parents[1] / "_ops.so"

# The file of `ops/triton` that owns an op on GPUs, by a function of the op's name.
TRITON_OPS = {
    "linear": "linear",
    "linear_projected": "linear",
    "linear_backward": "linear_backward",
    "add_delta": "add_delta",
    "add_delta_": "add_delta",
    "project": "project",
    "row_scale": "row_scale",
    "rescale": "rescale",
    "rescale_backward": "rescale",
    "orthonormalize": "orthonormalize",
}
# Ampere and later: what the kernels are compiled and budgeted for. bf16 has no tensor cores before.
TRITON_CAPABILITY = (8, 0)
# The tiles hold whole rows of R; r beyond this, like fp64, is computed in plain torch.
TRITON_MAX_RANK = 256

# Who computes the base product of `linear` for many tokens, and that of its backward. Not measured: a model from two
# ceilings of an H100, 3.0 TB/s and 790 TFLOP/s, and from Triton's products usually reaching about 85 % of cuBLAS.
#
# [x | q] · [W | b]ᵀ by cuBLAS copies x, 4 K bytes a token, instead of losing those 15 %: where W was laid out for it.
CONCATENATE_WHERE_LAID_OUT = True
# A second pass over y costs 527 / K of the base product, one over dx 527 / N: less than 15 % of it from here on.
ADD_AFTERWARDS_FROM_K = 3584
# fp32 without TF32 has no tensor cores, and vendor loops of plain multiply-adds are well ahead of Triton's.
ADD_AFTERWARDS_IN_FP32 = True


def _checked(op: str, meaning: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as an owner: the contract is checked first, as the C++ owners do."""
    names = [argument.name for argument in getattr(torch.ops.loraxs, op).default._schema.arguments]
    shaped = tensors_of(op)

    @wraps(meaning)
    def owner(*args: Any, **kwargs: Any) -> Any:
        given = {name: None for name in names} | dict(zip(names, args, strict=False)) | kwargs
        check(op, given.get("p_drop") or 0.0, **{name: given[name] for name in shaped})
        if given.get("slots") is not None:
            _check_slots(op, given["slots"], given[table_of(op)].shape[0])
        if not torch._C._is_any_autocast_enabled():
            return meaning(*args, **kwargs)
        # The contract fixes the precision of every sum; autocast must not lower it inside the op.
        with torch.autocast(given[shaped[0]].device.type, enabled=False):
            return meaning(*args, **kwargs)

    return owner


def _check_slots(op: str, slots: torch.Tensor, n_slots: int) -> None:
    """Slots out of range are refused on the CPU; on a device that check would wait for the device."""
    if slots.device.type != "cpu" or slots.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(slots))
    if low < -1 or high >= n_slots:
        bad = low if low < -1 else high
        raise ValueError(f"loraxs::{op}: slots: expected values in [-1, {n_slots}), got {bad}")


def _register() -> bool:
    """Register the reference everywhere and the compiled owners where they are built; True if they are."""
    for op in OPS:
        for name, owner in _names(op, _checked(op, getattr(reference, op))).items():
            LIBRARY.impl(name, owner, "CompositeExplicitAutograd")
    LIBRARY.impl("_eigh", eigh.eigh, "CompositeExplicitAutograd")
    if BACKEND == "reference":
        return False
    compiled = _load_compiled()
    _register_triton()
    return compiled


def _names(op: str, owner: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """What an owner of `op` is registered as, under each of its names."""
    named = {name: owner for name in (op, UNWRAPPED.get(op)) if name}
    return named | {"_linear_output": lambda *args: owner(*args)[0]} if op == "linear" else named


def _load_compiled() -> bool:
    if not _OPS_LIBRARY.exists():
        warnings.warn(
            "loraxs_ext: the compiled ops are not built, every op runs in plain torch; "
            "build them with `pip install --no-build-isolation -e .`",
            stacklevel=2,
        )
        return False
    torch.ops.load_library(str(_OPS_LIBRARY))
    return True


def _register_triton() -> None:
    """Triton owns what no compiled kernel owns on GPUs. Triton itself is imported by the first call."""
    for op in OPS.keys() & TRITON_OPS.keys():
        owner = _checked(op, _triton_owner(op))
        if op == "linear" and _decodes_in_cuda():
            owner = decode.before(owner)
        for name, named in _names(op, owner).items():
            if not _has_kernel(name, "CUDA"):
                LIBRARY.impl(name, named, "CUDA")
                _TRITON_OWNS.add(op)
    LIBRARY.impl("_eigh", _eigh_on_gpu, "CUDA")


def _decodes_in_cuda() -> bool:
    """Whether the CUDA kernels for few tokens come before Triton's: where they are built and asked for."""
    return BACKEND == "cuda" and _has_kernel("_linear_decode", "CUDA")


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"loraxs::{name}", key)


def _triton_owner(op: str) -> Callable[..., Any]:
    """The op on a GPU: by Triton where dtype, rank and device allow it, else in plain torch, as `owners` says."""
    plain = getattr(reference, op)
    names = [argument.name for argument in getattr(torch.ops.loraxs, op).default._schema.arguments]

    @wraps(plain)
    def owner(*args: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        device, dtype = args[0].device, args[0].dtype
        columns = given.get("pages", given.get("Y"))
        small = columns is None or columns.shape[-1] <= TRITON_MAX_RANK
        if dtype == torch.float64 or not small or not _triton_runs_on(device.index):
            return plain(*args)
        options: dict[str, Any] = {}
        if op == "linear_backward":
            options["fuse_base"] = not adds_afterwards(given["dy"])
        elif op in ("linear", "linear_projected"):
            options["product"] = _launcher(*product_owner(given["x"], given["weight"], given["b"]))
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device(device):
            return _launcher(TRITON_OPS[op], op)(*args, **options)

    return owner


def _eigh_on_gpu(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`eigh` by Triton's Jacobi kernel where `by_jacobi` says so, else by torch."""
    contract.check_symmetric(A)
    if not (eigh.by_jacobi(A, asked_for=BACKEND == "triton") and _triton_runs_on(A.device.index)):
        return eigh.eigh(A)
    with torch.cuda.device(A.device):
        return _launcher("eigh", "eigh")(A)


@cache
def _launcher(file: str, function: str) -> Callable[..., Any]:
    return getattr(import_module(f"{__package__}.triton.{file}"), function)


def product_owner(x: torch.Tensor, weight: torch.Tensor, b: torch.Tensor) -> tuple[str, str]:
    """(file, function) in `ops/triton` of what computes x Wᵀ + q bᵀ for many tokens."""
    if BACKEND != "triton" and CONCATENATE_WHERE_LAID_OUT and _launcher("cublas", "is_laid_out")(weight, b):
        return "cublas", "concatenated"
    return ("cublas", "expanded") if adds_afterwards(x) else ("linear", "one_pass")


def adds_afterwards(x: torch.Tensor) -> bool:
    """Whether cuBLAS computes x Wᵀ, or dy W for x = dy, and a second pass over the result adds the low-rank part."""
    if BACKEND == "triton":
        return False
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return ADD_AFTERWARDS_IN_FP32
    return x.shape[-1] >= ADD_AFTERWARDS_FROM_K


@cache
def _triton_runs_on(index: int) -> bool:
    """Whether Triton is there and the GPU is new enough; an error instead of False where Triton was asked for."""
    obstacle = _obstacle(index)
    if obstacle and BACKEND == "triton":
        raise RuntimeError(f"LORAXS_BACKEND=triton: {obstacle}")
    return not obstacle


def _obstacle(index: int) -> str:
    """Why Triton cannot run on a GPU; empty if it can. Looking for Triton does not import it."""
    if find_spec("triton") is None:
        return "expected the package triton to be installed, found none"
    capability = torch.cuda.get_device_capability(index)
    if capability >= TRITON_CAPABILITY:
        return ""
    return (
        f"expected compute capability {_version(TRITON_CAPABILITY)} or later, cuda:{index} has {_version(capability)}"
    )


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


_TRITON_OWNS: set[str] = set()
_COMPOSED: dict[tuple[str, str], str] = {}
COMPILED = _register()


def compose(op: str, device: str, how: str, owner: Callable[..., Any]) -> None:
    """Let a room of the house compute `op` on a device by a method `how` that is itself made of torch and other ops."""
    if BACKEND != "reference":
        LIBRARY.impl(op, _checked(op, owner), device.upper())
        _COMPOSED[op, device] = how


def owners() -> dict[str, dict[str, str]]:
    """Who computes each op: {op: {"cpu": "C++" | "plain torch", "cuda": "CUDA" | "Triton, ..." | "plain torch, ..."}}.

    Read from torch's dispatcher and, where there are GPUs, from their compute capability.
    """
    return {op: {"cpu": _cpu_owner(op), "cuda": _cuda_owner(op)} for op in OPS}


def _cpu_owner(op: str) -> str:
    if op == "orthonormalize" and _has_kernel("_cholesky_qr", "CPU") and BACKEND != "reference":
        return f"C++ for k ≤ {COMPILED_ROWS}, plain torch beyond"
    return _COMPOSED.get((op, "cpu")) or ("C++" if _has_kernel(op, "CPU") else "plain torch")


def _cuda_owner(op: str) -> str:
    if (op, "cuda") in _COMPOSED:
        return _COMPOSED[op, "cuda"]
    if op not in _TRITON_OWNS:
        return "CUDA" if _has_kernel(op, "CUDA") else "plain torch"
    if find_spec("triton") is None:
        return "plain torch, as Triton is not installed"
    devices = range(torch.cuda.device_count())
    old = [f"cuda:{index}" for index in devices if _obstacle(index)]
    if old and len(old) == len(devices):
        return f"plain torch, as Triton's kernels need compute capability {_version(TRITON_CAPABILITY)}"
    few = "CUDA for few tokens, " if op == "linear" and _decodes_in_cuda() else ""
    tall = [] if op in ("project", "rescale", "rescale_backward") else [f"r > {TRITON_MAX_RANK}"]
    return few + "Triton, plain torch for " + ", ".join([*old, "fp64", *tall])
