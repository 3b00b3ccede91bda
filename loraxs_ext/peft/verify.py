"""Is this the basis R was trained on? Measure and decide.

The error of a module is the root mean square over its singular vectors; it comes out within a factor of 2 of the
relative error of ΔW. Worst module of MiniLM-L6 (36 weights) at r = 4 / 16 / 25, against the basis of the fp32 weights:
fp16 1e-3 / 2e-3 / 5e-3, bf16 0.02 / 0.02 / 0.03, int8 by rows 0.07 / 0.07 / 0.10, nf4 0.77 / 0.66 / 0.62, another
layer of the same model at least 0.72. A tolerance of 0.1 takes other precisions of one model and nothing else.

Where an anchor of the old basis is at hand, its residual tells the weights apart better than that, and the bounds of
`loraxs_ext.basis.anchor` decide.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraxs_ext import basis
from loraxs_ext.basis import Factors
from loraxs_ext.basis.anchor import SAME_MODEL, SAME_WEIGHTS, describe_residual
from loraxs_ext.layers import LoraXSLayer, complete

from .transport import root_mean_square

# The default of `LoraXSConfig.basis_tol`.
DEFAULT_TOL = 0.1


class Mismatch(NamedTuple):
    """How far the basis of one layer is from the one its R was trained on.

    Attributes:
        key: name of the layer.
        error: of the basis that R will stand on.
        residual: how far the weights are from those of the old basis, where an anchor or a basis file tells; else None.
    """

    key: str
    error: float
    residual: float | None = None


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
        of its r vectors; 0 where nothing was recorded yet, or where hotswap erased an adapter that the new one lacks.
    """
    erased = not stored.any() and not layer.loraxs_magnitude and not complete(layer.core(adapter).on_basis).any()
    if stored.isnan().all() or erased:
        return torch.ones(stored.shape[1]), 0.0
    signs, error = basis.compare_sketch(stored, current_factors(layer, layer.r[adapter]))
    return signs, root_mean_square(error)


def report(adapter: str, mismatches: Sequence[Mismatch], check: str, tol: float, same: float) -> None:
    """Raise, warn or pass, after the worst of `mismatches`.

    Args:
        adapter: name, for messages.
        mismatches: one per module.
        check: "error", "warn" or "ignore".
        tol: up to this error the basis is accepted, with a warning; up to SAME_MODEL · tol / DEFAULT_TOL a residual.
        same: up to this error in silence; the accuracy that the recipe asks of a basis.

    Raises:
        ValueError: the worst error (or NaN) or the worst residual is beyond its bound, and `check` is "error".
    """
    if not mismatches or check == "ignore":
        return
    worst = max(mismatches, key=lambda m: (_severity(m, tol, same), m.residual or 0.0, m.error))
    severity = _severity(worst, tol, same)
    if severity == _SAME:
        return
    numbers = f"worst module {worst.key}: error {worst.error:.3g}, accepted up to {tol:.3g}"
    if worst.residual is not None:
        told = f"{describe_residual(worst.residual)} by a residual of {worst.residual:.2g}"
        numbers = f"{told}, accepted up to {_residual_limit(tol):.2g}; {numbers}"
    if severity == _CLOSE:
        warnings.warn(
            f"LoRA-XS adapter {adapter!r}: the base weights differ slightly from those it was trained on, as those of "
            f"another precision do ({numbers}). Expect a difference of about that size in its update.",
            stacklevel=2,
        )
        return
    message = (
        f"LoRA-XS adapter {adapter!r} was trained on another base model, revision or quantisation: the singular "
        f"vectors of {sum(_severity(m, tol, same) == _FOREIGN for m in mismatches)} of {len(mismatches)} modules do "
        f"not match ({numbers}). Load the base it was trained on, or save it with save_basis=True there."
    )
    if check == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


# Severities.
_SAME, _CLOSE, _FOREIGN = range(3)


def _severity(mismatch: Mismatch, tol: float, same: float) -> int:
    """_SAME, _CLOSE or _FOREIGN, by the error and by the residual, whichever is worse; NaN is foreign."""
    by_error = _SAME if mismatch.error <= same else _CLOSE if mismatch.error <= tol else _FOREIGN
    if mismatch.residual is None:
        return by_error
    residual, limit = mismatch.residual, _residual_limit(tol)
    return max(by_error, _SAME if residual <= SAME_WEIGHTS else _CLOSE if residual <= limit else _FOREIGN)


def _residual_limit(tol: float) -> float:
    """The one dial a user has moves both bounds."""
    return SAME_MODEL * tol / DEFAULT_TOL


def is_foreign(mismatch: Mismatch, tol: float) -> bool:
    """Whether `report` refuses it."""
    return _severity(mismatch, tol, 0.0) == _FOREIGN


def flip_signs(core: Tensor, signs: Tensor) -> Tensor:
    """D R D with D = diag(signs), for singular vectors are determined up to their sign; R itself if none differs.

    Args:
        core: R [..., r, r].
        signs: [r] of ±1.
    """
    if (signs > 0).all():
        return core
    core = complete(core)
    d = signs.to(core)
    return d[:, None] * core * d


def record(layer: LoraXSLayer, adapter: str) -> Tensor:
    """Note in the core that R now belongs to the basis the layer has; returns the sketch [5, r] of that."""
    core = layer.core(adapter)
    factors = current_factors(layer, core.rank)
    sketch = basis.sketch(factors, core.rank)
    core.record(sketch, factors.a, factors.bt)
    return sketch
