"""Is this the basis R was trained on? Measure, decide, and move R where it can be moved.

The error of a module is the root mean square over its singular vectors; it comes out within a factor of 2 of the
relative error of ΔW. Worst module of MiniLM-L6 (36 weights) at r = 4 / 16 / 25, against the basis of the fp32 weights:
fp16 1e-3 / 2e-3 / 5e-3, bf16 0.02 / 0.02 / 0.03, int8 by rows 0.07 / 0.07 / 0.10, nf4 0.77 / 0.66 / 0.62, another
layer of the same model at least 0.72. A tolerance of 0.1 takes other precisions of one model and nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraxs_ext import basis
from loraxs_ext.basis import Factors
from loraxs_ext.layers import LoraXSLayer


class Mismatch(NamedTuple):
    """How far the basis of one layer is from the one its R was trained on."""

    key: str
    error: float


def current_factors(layer: LoraXSLayer, rank: int) -> Factors:
    """The first `rank` rows of the layer's basis. |a_k|·|b_k| is the singular value wherever the recipe put it."""
    a, bt = layer.basis_rows(rank)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    s = a.to(dtype).norm(dim=1) * bt.to(dtype).norm(dim=1)
    return Factors(a, bt, s, 0.0)


def measure(layer: LoraXSLayer, adapter: str, stored: Tensor) -> tuple[Tensor, float]:
    """Compare a stored sketch [5, r] with the basis of `layer`.

    Returns:
        signs [r] of ±1 that turn the stored basis into the layer's, and the root mean square of the relative errors
        of its r vectors; 0 where nothing was recorded yet.
    """
    if stored.isnan().all():
        return torch.ones(stored.shape[1]), 0.0
    signs, error = basis.compare_sketch(stored, current_factors(layer, layer.r[adapter]))
    return signs, float(error.double().square().mean().sqrt())


def report(adapter: str, mismatches: Sequence[Mismatch], check: str, tol: float, same: float) -> None:
    """Raise, warn or pass, after the worst of `mismatches`.

    Args:
        adapter: name, for messages.
        mismatches: one per module.
        check: "error", "warn" or "ignore".
        tol: up to this error the basis is accepted, with a warning.
        same: up to this error in silence; the accuracy that the recipe asks of a basis.

    Raises:
        ValueError: the worst error exceeds `tol` (or is NaN) and `check` is "error".
    """
    if not mismatches or check == "ignore":
        return
    worst = max(mismatches, key=lambda m: m.error if m.error == m.error else float("inf"))
    if worst.error <= same:
        return
    numbers = f"worst module {worst.key}: error {worst.error:.3g}, accepted up to {tol:.3g}"
    if worst.error <= tol:
        warnings.warn(
            f"LoRA-XS adapter {adapter!r}: the base weights differ slightly from those it was trained on, as those of "
            f"another precision do ({numbers}). Expect a difference of about that size in its update.",
            stacklevel=2,
        )
        return
    message = (
        f"LoRA-XS adapter {adapter!r} was trained on another base model, revision or quantisation: the singular "
        f"vectors of {sum(not m.error <= tol for m in mismatches)} of {len(mismatches)} modules do not match "
        f"({numbers}). Load the base it was trained on, or save it with save_basis=True there."
    )
    if check == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def flip_signs(core: Tensor, signs: Tensor) -> Tensor:
    """D R D with D = diag(signs), for singular vectors are determined up to their sign; R itself if none differs."""
    if (signs > 0).all():
        return core
    d = signs.to(core)
    return d[:, None] * core * d


def record(layer: LoraXSLayer, adapter: str) -> None:
    """Note in the core that R now belongs to the basis the layer has."""
    core = layer.core(adapter)
    factors = current_factors(layer, core.rank)
    core.record(basis.sketch(factors, core.rank), factors.a, factors.bt)


def transport(core: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """Express B R A on another basis: R' = B'⁺ B R A A'⁺, computed in fp64.

    Args:
        core: R [r, r].
        old, new: (a [r, K], bt [r, N]) before and after.

    Returns:
        R' [r, r] in the dtype of `core`, and ‖B'R'A' − B R A‖ / ‖B R A‖ (0 if R is 0).
    """
    r0 = core.double()
    (a0, b0), (a1, b1) = ((a.to(core.device).double(), bt.to(core.device).double().mT) for a, bt in (old, new))
    moved = torch.linalg.pinv(b1) @ b0 @ r0 @ a0 @ torch.linalg.pinv(a1)
    # ‖B R A‖² = ⟨BᵀB R, R AAᵀ⟩: the r×r Gram matrices say it all, no [N, K] product is formed.
    size = _inner(b0, r0, a0, b0, r0, a0)
    gap = size - 2 * _inner(b0, r0, a0, b1, moved, a1) + _inner(b1, moved, a1, b1, moved, a1)
    return moved.to(core.dtype), float((gap.clamp_min(0) / size.clamp_min(1e-300)).sqrt()) if size > 0 else 0.0


def _inner(b0: Tensor, r0: Tensor, a0: Tensor, b1: Tensor, r1: Tensor, a1: Tensor) -> Tensor:
    return ((b0.mT @ b1) @ r1 * (r0 @ (a0 @ a1.mT))).sum()
