"""The LoRA-XS layer over an embedding: rows of B in place of a product with B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .linear import LoraXSLinear
from .path import LowRankPath, add_path


class LoraXSEmbedding(LoraXSLinear):
    """E'[i] = E[i] + s·B[i] R A, with A and B from the SVD of the weight [V, d] as W with N = V and K = d.

    R gets the gradient s·Bᵀ (∂L/∂W) Aᵀ of the gradient that nn.Embedding gives W: `scale_grad_by_freq` counts, and the
    row `padding_idx`, which torch never trains, stays as it is, in training, serving and merging. `max_norm` bounds the
    rows of the base layer only. Dropout does not apply: the input is an index.
    """

    shares_projection = False
    takes_magnitude = False

    def matrix_features(self, base: nn.Module) -> tuple[int, int]:
        """d and V.

        Raises:
            TypeError: the module is called with something else than indices.
        """
        assert isinstance(base, nn.Embedding)
        if type(base).forward is not nn.Embedding.forward and not hasattr(base, "embed_scale"):
            raise TypeError(
                f"target_modules: {self.key}: expected torch.nn.Embedding, called with indices, got "
                f"{type(base).__name__}, which has a forward of its own"
            )
        return base.embedding_dim, base.num_embeddings

    def update_layer(self, adapter: str, r: int, lora_alpha: float, *, dropout: float = 0.0, **options: Any) -> None:
        """See `LoraXSLayer.update_layer`; `dropout` is ignored."""
        super().update_layer(adapter, r, lora_alpha, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """E'[x] [..., d] for indices x [...]."""
        bare = self.is_bare()
        y = self.base_layer(x, *args, **kwargs)
        # An index is one token, whatever the width of the row it stands for.
        for path in () if bare else self.paths(x[..., None]):
            y = add_path(y, *self._by_rows(x, path))
        base: Any = self.get_base_layer()
        if base.scale_grad_by_freq and y.requires_grad:
            _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
            y.register_hook(lambda dy: dy / counts[inverse][..., None].to(dy.dtype))
        return y

    def check_mergeable(self) -> None:
        """Refuse an embedding with `max_norm`.

        Raises:
            ValueError: it would cut the merged rows.
        """
        super().check_mergeable()
        base: Any = self.get_base_layer()
        if base.max_norm is not None:
            raise ValueError(
                f"{self.key}: base_layer: expected an embedding without max_norm to merge into, because merged rows "
                f"would be cut, got max_norm={base.max_norm}"
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts linear layers only."""
        return False

    def _by_rows(self, x: Tensor, path: LowRankPath) -> tuple[Tensor, LowRankPath]:
        """B[x] [..., r], and the path that takes it for x of the path: (q Iᵀ) Rᵀᵀ (Aᵀ)ᵀ = q R A."""
        base: Any = self.get_base_layer()
        bt = path.b.mT
        q = bt.index_select(1, x.reshape(-1)).mT.reshape(*x.shape, len(bt))
        if base.padding_idx is not None:
            q = q.masked_fill((x == base.padding_idx)[..., None], 0)
        scale = self._get_embed_scale()
        if scale is not None:
            q = q * scale
        identity = torch.eye(len(bt), dtype=bt.dtype, device=bt.device)
        return q.to(bt.dtype), path._replace(a=identity, b=path.a.mT, pages=path.pages.mT)

    def _weight_delta(self, adapter: str) -> Tensor:
        delta = super()._weight_delta(adapter)
        base: Any = self.get_base_layer()
        if base.padding_idx is not None:
            delta[base.padding_idx] = 0
        return delta
