"""An old basis found again in the weights at hand, or R expressed on another one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loraxs_ext import basis
from loraxs_ext.basis import BasisFile, Factors, Recipe
from loraxs_ext.basis.anchor import SEARCHED
from loraxs_ext.basis.cache import cache_directory

# Root mean square error up to which two sketches are of one basis: that of bf16 factors is 3e-3, of another layer 0.7.
_SAME_BASIS = 1e-2


class Restored(NamedTuple):
    """An old basis, made of the weights at hand.

    Attributes:
        factors: of the old rank.
        residual: what of the anchor could not be found, as in `loraxs_ext.basis.rotate_onto`.
        error: of the factors against the sketch that came with R.
    """

    factors: Factors
    residual: float
    error: float


class Source(NamedTuple):
    """Weights at hand: their shape (N, K), and what returns them."""

    shape: tuple[int, int]
    load: Callable[[], Tensor]


def restore(
    file: BasisFile, sketches: Mapping[str, Tensor], weights: Mapping[str, Source], recipe: Recipe
) -> dict[str, Restored]:
    """The bases that these sketches were made of, as far as `file` has their anchors.

    Args:
        file: bases or anchors, of the old weights.
        sketches: [5, r] by module key, as they came with R.
        weights: by module key, those at hand.
        recipe: of the adapter.

    Returns:
        By module key; modules whose anchor is not in the file, or belongs to another basis or shape, are left out.
    """
    anchors = {}
    for key, stored in sketches.items():
        name, rank = file.find(key), stored.shape[1]
        if name is None or rank > file.modules[name].rank or file.modules[name].shape != weights[key].shape:
            continue
        signs, errors = basis.compare_sketches(file.sketch(name)[:, :rank], stored)
        if root_mean_square(errors) <= _SAME_BASIS:
            anchor = file.anchor(name).cut(rank)
            anchors[key] = anchor._replace(projections=anchor.projections * signs[:, None])
    # A larger basis of the reference's kind would be as far from converged as the small one.
    search = dataclasses.replace(recipe, svd="converged") if recipe.svd == "reference" else recipe
    ranks = {key: min(len(anchor.s) + SEARCHED, *weights[key].shape) for key, anchor in anchors.items()}
    with warnings.catch_warnings():
        # Where the larger basis ends does not matter, so neither does a cluster there.
        warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ weights miss the subspace tolerance", RuntimeWarning)
        fresh = basis.decompose({key: weights[key].load for key in anchors}, ranks, search, cache_dir="default")
    restored = {}
    for key, larger in fresh.items():
        factors, residual = basis.rotate_onto(anchors[key], larger, recipe.sigma)
        error = root_mean_square(basis.compare_sketch(sketches[key], factors)[1])
        restored[key] = Restored(factors, residual, error)
    return restored


def root_mean_square(errors: Tensor) -> float:
    """√ of the mean square."""
    return float(errors.double().square().mean().sqrt())


def anchors_path(sketches: Mapping[str, Tensor], recipe: Recipe) -> Path:
    """Where the anchors of the bases with these sketches lie in the cache: one file a basis, for all its adapters."""
    digest = hashlib.blake2b(json.dumps(recipe.to_dict(), sort_keys=True).encode(), digest_size=8)
    for key, stored in sorted(sketches.items()):
        digest.update(f"{key} {stored.shape[1]} ".encode())
        digest.update(stored.detach().float().cpu().contiguous().numpy().tobytes())
    folder = cache_directory("default")
    assert folder is not None  # only None as a choice gives none
    return folder / "anchors" / f"{digest.hexdigest()}.safetensors"


def remember(sketches: Mapping[str, Tensor], factors: Mapping[str, Factors], recipe: Recipe) -> None:
    """Keep the anchors of these bases in the cache.

    Args:
        sketches: [5, r] by module key, as they will travel with R.
        factors: of rank r, by module key, with the fingerprints of their weights.
        recipe: how they were made.
    """
    path = anchors_path(sketches, recipe)
    try:
        basis.write_basis_file(path, recipe, factors, anchors_only=True)
    except OSError as reason:
        warnings.warn(f"the basis cache {path.parent} cannot be written: {reason}", RuntimeWarning, stacklevel=2)


def transport(core: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """Express B R A on another basis: R' = B'⁺ B R A A'⁺, computed in fp64.

    Args:
        core: R [r, r], or several [..., r, r].
        old, new: (a [r, K], bt [r, N]) before and after.

    Returns:
        R' in the shape and dtype of `core`, and ‖B'R'A' − B R A‖ / ‖B R A‖ (0 if R is 0), all of them together.
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
