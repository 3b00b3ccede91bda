"""The LoRA-XS layer over a convolution with kernel 1: a linear layer over channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .linear import LoraXSLinear
from .path import add_path

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoraXSConv(LoraXSLinear):
    """y = conv(x) + s·B R A x at every place, for nn.Conv1d, Conv2d and Conv3d with kernel 1.

    The low-rank part reads x and adds to y channels-last; in that memory format neither is copied.
    """

    shares_projection = False
    takes_magnitude = False

    def matrix_features(self, base: nn.Module) -> tuple[int, int]:
        """Channels in and out.

        Raises:
            TypeError: the convolution is more than a linear layer over channels.
        """
        assert isinstance(base, Convolution)
        padding = {base.padding} - {"valid", "same"} if isinstance(base.padding, str) else set(base.padding) - {0}
        if set(base.kernel_size) != {1} or base.groups != 1 or padding:
            raise TypeError(
                f"target_modules: {self.key}: expected a convolution of kernel_size 1, groups 1 and padding 0, got "
                f"kernel_size {base.kernel_size}, groups {base.groups} and padding {base.padding}"
            )
        return base.in_channels, base.out_channels

    def as_matrix(self, stored: Tensor) -> Tensor:
        """W [N, K] of [N, K, 1, …]."""
        return stored.flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """[N, K, 1, …] of W [N, K]."""
        base: Any = self.get_base_layer()
        return matrix.reshape(base.weight.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts linear layers only."""
        return False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [B, N, …] for x [B, K, …], or either without B."""
        bare = self.is_bare()
        y = self.base_layer(x, *args, **kwargs)
        if bare:
            return y
        base: Any = self.get_base_layer()
        channels = -1 - len(base.stride)
        steps: tuple[Any, ...] = (..., *(slice(None, None, step) for step in base.stride))
        seen = x[steps].movedim(channels, -1)
        y = y.movedim(channels, -1)
        for path in self.paths(seen):
            y = add_path(y, seen, path)
        return y.movedim(-1, channels)
