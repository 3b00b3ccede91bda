"""Corrections to Triton's interpreter, which keeps bf16 as raw 16-bit integers and computes with those.

- Conversions between fp32 and bf16 round to nearest even.
- A dot multiplies values, not bit patterns, and sums k in order: the same bits whatever the shape of the tile, so that
  tests can ask whether a row depends on its neighbours.
- Any other arithmetic on bf16 is refused: the kernels compute in fp32.

And Triton 3.6 makes loop bounds of arrays with one element, which NumPy 2.5 no longer takes for integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half_up = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    rounded = ((bits.astype(np.uint64) + half_up) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def apply() -> None:
    """Patch the interpreter of this process; Triton must have been imported with TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    original_cast, original_convert, original_binary = Builder.cast_impl, Builder.create_fp_to_fp, Builder.binary_op

    def converted(source: Any, target: Any) -> TensorHandle | None:
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(bf16_to_fp32(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(fp32_to_bf16(source.data), tl.bfloat16)
        return None

    def cast(self: Any, source: Any, target: Any) -> Any:
        result = converted(source, target)  # never `or`: a handle is false when one of its values is zero
        return original_cast(self, source, target) if result is None else result

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        result = converted(source, target)
        return original_convert(self, source, target, rounding) if result is None else result

    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            raise NotImplementedError(f"{op.__name__} in bf16: convert to fp32 first, as the kernels should")
        return original_binary(self, left, right, op)

    def values(handle: Any) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return bf16_to_fp32(handle.data)
        return handle.data.astype(np.float64 if handle.dtype.scalar == tl.float64 else np.float32)

    def dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        left, right = values(a), values(b)
        total = np.zeros_like(acc.data)
        for k in range(left.shape[-1]):
            total = total + left[..., :, k, None] * right[..., None, k, :]
        return TensorHandle(acc.data + total, acc.dtype.scalar)

    original_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    Builder.cast_impl, Builder.create_fp_to_fp, Builder.binary_op = cast, convert, binary
    Builder.create_dot = dot
