"""The frozen factors of one layer, and where the singular values sit in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .recipe import SigmaPlacement


class Factors(NamedTuple):
    """A and B of ΔW = s·B R A, with the singular values placed as the recipe says.

    Attributes:
        a: [r, K], rows are scaled right singular vectors.
        bt: [r, N], the transpose of B, contiguous: rows are scaled left singular vectors.
        s: [r] singular values in the order of the vectors; fp32, or fp64 for fp64 weights.
        subspace_error: estimated sine of the largest angle between the span of the rows and the true singular subspace.
    """

    a: Tensor
    bt: Tensor
    s: Tensor
    subspace_error: float


def place_sigma(
    W: Tensor, left: Tensor, right: Tensor, projected: Tensor, s: Tensor, sigma: SigmaPlacement
) -> tuple[Tensor, Tensor]:
    """Factors (a, bt) of the requested placement, the last one computed from W by a product, so that they fit exactly.

    "A": bt = Uᵀ, a = UᵀW. "B": a = Vᵀ, bt = V ᵀWᵀ. "sqrt": bt = √ΣUᵀ, a = √Σ⁻¹UᵀW (0 where a singular value is 0).

    Args:
        W: [..., N, K].
        left, right: [..., r, N] and [..., r, K] orthonormal rows Uᵀ and Vᵀ.
        projected: [..., r, K], the product UᵀW.
        s: [..., r] singular values.
        sigma: where the singular values go.
    """
    if sigma == "A":
        return projected, left
    if sigma == "B":
        return right, right @ W.mT
    root = s.sqrt()[..., None]
    return torch.where(root > 0, projected / root, 0.0), left * root
