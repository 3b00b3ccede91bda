"""The frozen factors of one layer, and where the singular values sit in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import times_power_of_two
from .recipe import SigmaPlacement


class Factors(NamedTuple):
    """A and B of ΔW = s·B R A, with the singular values placed as the recipe says.

    Attributes:
        a: [r, K], rows are scaled right singular vectors.
        bt: [r, N], the transpose of B, contiguous: rows are scaled left singular vectors.
        s: [r] singular values in the order of the vectors; fp32, or fp64 for fp64 weights.
        subspace_error: estimated sine of the largest angle between the span of the rows and the true singular subspace.
        fingerprint: of the weight, where it was needed for a cache; else None.
    """

    a: Tensor
    bt: Tensor
    s: Tensor
    subspace_error: float
    fingerprint: str | None = None

    def cut(self, rank: int) -> Factors:
        """The factors of a smaller rank."""
        return self._replace(a=self.a[:rank], bt=self.bt[:rank], s=self.s[:rank])


def place_sigma(
    left: Tensor, right: Tensor, s: Tensor, sigma: SigmaPlacement, exponents: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Factors (a, bt) of the requested placement, from one side's unit vectors and the product of W with them.

    "A" takes left = Uᵀ and right = UᵀW as they are; "B" takes left = VᵀWᵀ and right = Vᵀ; "sqrt" takes those of "A" and
    moves √Σ from right to left: bt = √ΣUᵀ, a = √Σ⁻¹UᵀW, 0 where a singular value is 0. No product is formed after this,
    so the factors fit W to the rounding of one product.

    Args:
        left: [b, r, N].
        right: [b, r, K].
        s: [b, r] singular values.
        sigma: where the singular values go.
        exponents: b even integers; the products and `s` are those of W times 2^−exponent.

    Returns:
        a [b, r, K] and bt [b, r, N] at the scale of W.
    """
    if sigma == "A":
        return times_power_of_two(right, exponents), left
    if sigma == "B":
        return right, times_power_of_two(left, exponents)
    root = s.sqrt()[..., None]
    halves = [exponent // 2 for exponent in exponents]
    moved = torch.where(root > 0, right / root, 0.0)
    return times_power_of_two(moved, halves), times_power_of_two(left * root, halves)
