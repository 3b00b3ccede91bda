"""y = x Wᵀ + bias + q bᵀ with the base product left to cuBLAS: q bᵀ rides along in it, or is added afterwards.

`concatenated` computes y = [x | q] · [W | b]ᵀ + bias in one product, where W and b lie side by side in memory.
`lay_out` puts them there once, when a layer is made; both stay ordinary views, recognised by their addresses. Per call
x is copied beside q. q is rounded to the dtype of x, one rounding of the low-rank part more than elsewhere; s is a
factor of q, so one buffer serves adapters of every scaling.

`expanded` computes y = x Wᵀ + bias and adds the low-rank part in place: a second pass over y, and its second rounding.

cuBLAS picks its kernel by M, so here a row's bits may depend on how many rows there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .add_delta import expand

# The joint rows stay a multiple of this many columns, which keeps their products on whole tiles.
ALIGNMENT = 64


def lay_out(weight: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of weight [N, K] and b [N, r] that are views of one buffer [N, K + r, padded with zeros].

    Args:
        weight, b: same dtype and device.

    Returns:
        (weight, b) with unchanged shapes and values, for `loraxs::linear` to recognise.

    Raises:
        ValueError: the two do not have the same number of rows, dtype and device.
    """
    if (weight.shape[0], weight.dtype, weight.device) != (b.shape[0], b.dtype, b.device):
        raise ValueError(
            f"b: expected {weight.shape[0]} rows of {weight.dtype} on {weight.device} as weight has, "
            f"got {b.shape[0]} rows of {b.dtype} on {b.device}"
        )
    (N, K), r = weight.shape, b.shape[1]
    joint = weight.new_zeros(N, _width(K, r))
    joint[:, :K], joint[:, K : K + r] = weight, b
    return joint[:, :K], joint[:, K : K + r]


def is_laid_out(weight: Tensor, b: Tensor) -> bool:
    """Whether weight and b are the views that `lay_out` returns; looks at addresses, not at values."""
    (N, K), r = weight.shape, b.shape[1]
    row = (_width(K, r), 1)
    return (
        weight.stride() == b.stride() == row
        and b.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        and b.storage_offset() == weight.storage_offset() + K
        and b.untyped_storage().nbytes() >= (weight.storage_offset() + N * row[0]) * b.element_size()
    )


def concatenated(x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slots: Tensor | None, q: Tensor) -> Tensor:
    """y [M, N] = x Wᵀ + bias + q bᵀ for a weight and b that `is_laid_out`; arguments as in `linear.one_pass`."""
    (M, K), (N, r) = x.shape, b.shape
    width = _width(K, r)
    joint = torch.empty(M, width, dtype=x.dtype, device=x.device)
    joint[:, :K], joint[:, K : K + r] = x, q
    # Zeros on both sides of the product: what torch.empty found there could be NaN.
    joint[:, K + r :] = 0.0
    return F.linear(joint, weight.as_strided((N, width), (width, 1)), bias)


def expanded(x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slots: Tensor | None, q: Tensor) -> Tensor:
    """y [M, N] = x Wᵀ + bias + q bᵀ for any weight; arguments as in `linear.one_pass`."""
    y = F.linear(x, weight, bias)
    expand(y, y, b, slots, q)
    return y


def _width(K: int, r: int) -> int:
    return -(-(K + r) // ALIGNMENT) * ALIGNMENT
