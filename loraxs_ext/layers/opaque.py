"""The LoRA-XS layer over a base layer whose weight cannot be read."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from .linear import LoraXSLinear
from .probing import call_frozen, probe_weight

# How modules call K and N.
_NAMES_OF_K = ("in_features", "infeatures", "input_size")
_NAMES_OF_N = ("out_features", "outfeatures", "output_size")


class LoraXSOpaque(LoraXSLinear):
    """y = f(x) + s·B R A x over any module f that proves linear, with A and B from W = f(I) − f(0).

    There is no weight to merge into. Where f computes without autograd, x gets the gradient of x Wᵀ.
    """

    shares_projection = False
    takes_magnitude = False

    def matrix_features(self, base: nn.Module) -> tuple[int, int]:
        """K as the module declares it, N likewise or as it turns out.

        Raises:
            TypeError: the module does not declare K, or does not map [M, K] to [M, N].
        """
        k, n = (_declared(base, names) for names in (_NAMES_OF_K, _NAMES_OF_N))
        if k is None:
            raise TypeError(
                f"target_modules: {self.key}: expected a linear layer, or a linear module with in_features, got "
                f"{type(base).__name__}"
            )
        if n is None:
            device, dtype = self._get_base_layer_device_and_dtype(base)
            n = call_frozen(base, torch.zeros(1, k, dtype=dtype, device=device), self.key).shape[1]
        return k, n

    def frozen_weight(self) -> Tensor:
        """W [N, K], as the base layer computes with it.

        Raises:
            TypeError: it is not linear.
        """
        base = self.get_base_layer()
        return probe_weight(base, self.in_features, self.basis_dtype, self.get_base_layer_device(), self.key)

    def check_mergeable(self) -> None:
        """Refuse.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{self.key}: base_layer: expected a weight to merge into, got {type(self.get_base_layer()).__name__}, "
            f"whose weight cannot be read; serve the adapter unmerged"
        )

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        device = torch.device("cpu")
        for tensor in chain(base_layer.parameters(), base_layer.buffers()):
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
                return tensor.device, tensor.dtype
            device = tensor.device
        return device, torch.float32


def _declared(base: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(base, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
