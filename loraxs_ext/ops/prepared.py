"""`linear` of layers with all but x and the slots found out before: what a server repeats for every token on the CPU.

An op finds weights, basis and pages through half a dozen tensor objects a layer. By the time a decoder comes back to a
layer, streaming the weights of the others has driven those out of the caches, and looking them up again takes longer
than the low-rank arithmetic of a token. Here a layer is one native record, and layers that read one x (query, key and
value) are one call, which starts the threads once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .stacked import Site

_RUN = torch.ops.loraxs._run_prepared.default


class PreparedLayers:
    """A call of several layers for one x: [ops.linear(x, *site)] with other slots each time, not differentiable.

    The memory of all tensors is kept, and what is written into it counts; a weight that is moved elsewhere is not
    followed. `prepare` makes one.
    """

    __slots__ = ("__weakref__", "_id")

    def __init__(self, identity: int) -> None:
        self._id = identity
        weakref.finalize(self, torch.ops.loraxs._forget.default, identity).atexit = False

    def __call__(self, x: Tensor, slots: Tensor) -> list[Tensor]:
        """y [..., N] of every layer, bit for bit that of `ops.linear`; none where only that op can compute it.

        Args:
            x: [..., K], in the dtype of the weights.
            slots: int32 [M].

        Raises:
            ValueError: an argument does not fit; the message names it.
        """
        return _RUN(x, slots, self._id)


def prepare(sites: Sequence[Site]) -> PreparedLayers | None:
    """The prepared call of these layers; None if they have to be called as ops.

    Args:
        sites: with weights of one K; their own slots are not read.

    Raises:
        ValueError: an argument does not fit the contract of `ops.linear`.
    """
    first, biases = sites[0], [site.bias.detach() for site in sites if site.bias is not None]
    alike = all(site.scale == first.scale and site.weight.dtype == first.weight.dtype for site in sites)
    if not backends.COMPILED or not first.weight.is_cpu or not alike or len(biases) not in (0, len(sites)):
        return None
    # Aliases keep the memory even where somebody gives `weight.data` another.
    columns = [[t.detach() for t in c] for c in zip(*((s.weight, s.a, s.b, s.pages) for s in sites), strict=True)]
    weight, a, b, pages = columns
    identity = torch.ops.loraxs._prepare(weight, biases, a, b, pages, first.scale)
    return PreparedLayers(identity) if identity else None
