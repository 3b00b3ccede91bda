"""Layers that read one x in one call, for inference: query, key and value, or gate and up.

A token of a decoder is hundreds of calls of a few tens of microseconds each. On the CPU, layers that share a call share
the dispatcher, the checks and one start of the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LINEAR = torch.ops.loraxs._linear.default
_LINEAR_SIBLINGS = torch.ops.loraxs.linear_siblings.default


class Siblings(NamedTuple):
    """The arguments of `ops.linear` of several layers, argument by argument; all of one scale.

    Attributes:
        weight, a, b, pages: one of each per layer.
        bias: one per layer, or none at all.
        scale: s of all.
    """

    weight: Sequence[Tensor]
    bias: Sequence[Tensor]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    pages: Sequence[Tensor]
    scale: float = 1.0


def linear_siblings(x: Tensor, layers: Siblings, slots: Tensor | None = None) -> list[Tensor]:
    """[ops.linear(x, …) of every layer], bit for bit, and not differentiable.

    Args:
        x: [..., K].
        layers: at least one.
        slots: int32 [M], as in `ops.linear`, in the pages of all layers.

    Raises:
        ValueError: an argument does not fit the contract; the message names it.
    """
    weight, bias, a, b, pages, scale = layers
    return _LINEAR_SIBLINGS(x, weight, bias, a, b, pages, slots, scale)


def one_by_one(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    pages: list[Tensor],
    slots: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """The op where nobody owns it: by the owner of `linear`."""
    sites = zip(weight, bias or [None] * len(weight), a, b, pages, strict=True)
    return [_LINEAR(x, *site, slots, scale)[0] for site in sites]
