"""Guards around the decomposition: true fp32 products, no gradients, scales without overflow, finite weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loraxs_ext import ops as _ops  # noqa: F401  (defines the op below)

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Squares and sums of squares of entries within 2^±24 stay far inside the range of fp32.
_SAFE_EXPONENT = 24
# Up to here one pass over a matrix is faster than two products with it.
_ONE_PASS_ROWS = 8

_gram_product = torch.ops.loraxs.gram_product.default


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run products in their own precision whatever the process has switched on: TF32, bf16 passes, autocast, grad."""
    # Backend by backend: torch.get_float32_matmul_precision raises once a process has used this newer interface.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


@contextlib.contextmanager
def reduced_precision(device: torch.device, *, enabled: bool) -> Iterator[None]:
    """Run fp32 products of a device in TF32 (CUDA) or bf16 (CPU, where the processor has it), if `enabled`."""
    on_cpu = device.type == "cpu"
    backend = torch.backends.mkldnn.matmul if on_cpu else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    try:
        if enabled:
            backend.fp32_precision = "bf16" if on_cpu else "tf32"
        yield
    finally:
        backend.fp32_precision = before


def check_floating(weight: Tensor, name: str) -> None:
    """Refuse what is not a floating-point matrix with values.

    Raises:
        TypeError: another dtype (a quantised weight must be dequantised first).
        ValueError: fewer than two dimensions, or no data.
    """
    if weight.dtype not in _FLOATS:
        raise TypeError(
            f"weight {name!r} must be fp32, fp64, bf16 or fp16, got {weight.dtype}; dequantise it before decomposing"
        )
    if weight.is_meta:
        raise ValueError(f"weight {name!r} is on the meta device and has no values; materialise it first")
    if weight.ndim < 2:
        raise ValueError(f"weight {name!r} must have at least 2 dimensions, got shape {tuple(weight.shape)}")


def finite_peaks(W: Tensor, names: Sequence[str]) -> list[float]:
    """Largest absolute entry of each matrix.

    Args:
        W: [b, N, K] of a float type, not empty.
        names: b names for the error message.

    Raises:
        ValueError: a matrix contains NaN or Inf.
    """
    peaks = torch.maximum(-W.amin((-2, -1)), W.amax((-2, -1))).tolist()
    for peak, name in zip(peaks, names, strict=True):
        if not math.isfinite(peak):
            raise ValueError(f"weight {name!r} contains {'NaN' if math.isnan(peak) else 'Inf'}")
    return peaks


def scale_exponents(W: Tensor, names: Sequence[str]) -> list[int]:
    """Even exponents e such that a matrix times 2^−e has entries of moderate size; 0 where it has already.

    Args:
        W: [b, N, K] of a float type, not empty.
        names: b names for the error message.

    Raises:
        ValueError: a matrix contains NaN or Inf.
    """
    # One pass instead of two where it tells enough: the largest entry lies between the norm and norm / √(N K).
    norms = torch.linalg.vector_norm(W, dim=(-2, -1)).tolist()
    low, high = 2.0 ** (1 - _SAFE_EXPONENT) * (W.shape[-2] * W.shape[-1]) ** 0.5, 2.0 ** (_SAFE_EXPONENT - 1)
    if all(low < norm < high for norm in norms):
        return [0] * len(norms)
    exponents = [0 if peak == 0.0 else math.frexp(peak)[1] for peak in finite_peaks(W, names)]
    return [0 if abs(e) <= _SAFE_EXPONENT else e - e % 2 for e in exponents]


def times_power_of_two(values: Tensor, exponents: Sequence[int]) -> Tensor:
    """values[i] · 2^exponents[i], exact but for overflow and underflow of the result.

    Args:
        values: [b, ...].
        exponents: b integers within the range of values' dtype.
    """
    if not any(exponents):
        return values
    # Two factors, because 2^±149 itself is out of the range of fp32.
    for part in ([e // 2 for e in exponents], [e - e // 2 for e in exponents]):
        factor = torch.tensor([math.ldexp(1.0, e) for e in part], dtype=values.dtype, device=values.device)
        values = values * factor.reshape(-1, *[1] * (values.ndim - 1))
    return values


def multiply_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows · matrix for few rows and a large matrix, never asking BLAS to transpose the large operand.

    With the transpose on the small side a CPU takes two thirds of the time (0.30 against 0.45 ms for 16 × 1024²).

    Args:
        rows: [b, l, n].
        matrix: [b, n, m], row-major or the transpose of a row-major matrix.

    Returns:
        [b, l, m], contiguous.
    """
    if matrix.stride(-1) == 1:
        return rows @ matrix
    return (matrix.mT @ rows.mT).mT.contiguous()


def gram_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows · matrix · matrixᵀ for few rows and a large matrix.

    Args:
        rows: [b, l, n].
        matrix: [b, n, m], row-major or the transpose of a row-major matrix.

    Returns:
        [b, l, n], contiguous.
    """
    if reads_once(matrix, rows.shape[-2]):
        return _gram_product(rows, matrix.mT)
    return multiply_rows(multiply_rows(rows, matrix), matrix.mT)


def reads_once(matrix: Tensor, count: int) -> bool:
    """Whether both products of `gram_rows` with `count` rows are made in one pass over the matrix.

    With 8 rows that takes 70 % of the time of two products on a CPU, with 16 as much as those (1024 × 1024).
    """
    fits = matrix.device.type == "cpu" and matrix.dtype == torch.float32 and count <= _ONE_PASS_ROWS
    return fits and matrix.stride(-2) == 1 and matrix.stride(-1) == matrix.shape[-2]
