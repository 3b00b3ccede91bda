"""EDoRA (Nasiri and Garraghan 2025; after DoRA, Liu et al. 2024): R, and a length for every row of the adapted weight.

    W' = diag(g) (W + s·B R A),   g_i = m_i / ‖w_i + s·b_i R a‖,   y = g ∘ (x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ) + bias

g comes from what `RowNorms` keeps of W; neither W nor ΔW is read for it. Training dropout reaches the correction only,
as in the reference: x' = drop(x) gives y = (x − x') Wᵀ + bias + g ∘ (x' Wᵀ + s·((x' Aᵀ) Rᵀ) Bᵀ).

An adapter stands for ΔW = W' − W, with or without a magnitude. Several active ones add up, merged or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraxs_ext import ops

from .sharding import is_sharded
from .tensor_parallel import own_columns

if TYPE_CHECKING:
    from .layer import LoraXSLayer
    from .linear import LoraXSLinear

Norm = Literal["detached", "differentiated"]

# Rows of W that are turned into fp64 at a time: 32 MB for a width of 4096.
_ROWS = 1024


class Magnitude(nn.Module):
    """The trainable m [N] of one adapter in one layer; in a state dict `loraxs_magnitude.<adapter>.weight`.

    m is the length of a row of the adapted weight and does not depend on the basis, so it is stored as it is.

    Args:
        out_features: N.
        dtype: fp32, or fp64 for an fp64 base.
        norm: whether the gradient of R takes the norm for a constant ("detached", as DoRA does) or not.
    """

    def __init__(self, out_features: int, dtype: torch.dtype, norm: Norm) -> None:
        super().__init__()
        self.through_norm = norm == "differentiated"
        # NaN until the lengths of W's rows are known.
        self.weight = nn.Parameter(torch.full((out_features,), torch.nan, dtype=dtype))

    @torch.no_grad()
    def start(self, lengths: Tensor) -> None:
        """Begin with the lengths [N] of the rows of W, unless there is an m already."""
        if not self.weight.is_meta and self.weight.isnan().all():
            self.weight.copy_(lengths)


class RowNorms(nn.Module):
    """What ‖w_i + s·b_i R a‖ needs of W, for one layer and all adapters of one rank; never saved, never trained.

    Args:
        rho: [N], ρ_i = ‖w_i − c_i Qᵀ‖², where a = L Qᵀ with QᵀQ = 1.
        c: [N, r], c = W Q; kept so that c.mT is contiguous, for the ops.
        root: [r, r], L.
    """

    rho: Tensor
    c: Tensor
    root: Tensor

    def __init__(self, rho: Tensor, c: Tensor, root: Tensor) -> None:
        super().__init__()
        for name, tensor in (("rho", rho.contiguous()), ("c", c.mT.contiguous().mT), ("root", root.contiguous())):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def measure(cls, weight: Tensor, a: Tensor, dtype: torch.dtype) -> RowNorms:
        """Of W [N, K] on any basis a [r, K], converged or not: computed in fp64, kept in `dtype`."""
        q, upper = torch.linalg.qr(a.double().mT)
        parts = []
        for rows in weight.split(_ROWS):
            wide = rows.to(q)
            c = wide @ q
            parts.append(((wide - c @ q.mT).square().sum(1).to(dtype), c.to(dtype)))
        rho, c = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(rho, c, upper.mT.to(dtype))

    def cut(self, r: int) -> RowNorms:
        """Of the first r rows of the basis: L is lower triangular, so what they leave out goes back into ρ exactly."""
        return RowNorms(self.rho + self.c[:, r:].square().sum(1), self.c[:, :r], self.root[:r, :r])

    def lengths(self) -> Tensor:
        """‖w_i‖ [N]."""
        return (self.rho + self.c.square().sum(1)).sqrt()


def row_scale(layer: LoraXSLayer, adapter: str, b: Tensor, pages: Tensor) -> Tensor:
    """g [1, N] of `adapter`, differentiable in its m and, where its norm is differentiated, in R = pages[0].

    Args:
        b: [N, r], of its basis.
        pages: [1, r, r].
    """
    modules: Any = layer._modules
    magnitude = modules["loraxs_magnitude"]._modules[adapter]
    norms = modules["loraxs_norms"]._modules.get(str(layer.r[adapter]))
    if norms is None:
        layer.settle(adapter)
        norms = modules["loraxs_norms"]._modules[str(layer.r[adapter])]
    kept = norms._buffers
    return ops.row_scale(
        kept["rho"], b, pages, None, magnitude._parameters["weight"].unsqueeze(0), layer.scaling[adapter],
        c=kept["c"], root=kept["root"], through_norm=magnitude.through_norm,
    )  # fmt: skip


def _row_scale_of(layer: LoraXSLayer, adapter: str) -> Tensor:
    return row_scale(layer, adapter, layer.get_basis(adapter)[1], layer.get_R(adapter).unsqueeze(0))


def route_scales(layer: LoraXSLayer, adapters: list[str]) -> Tensor | None:
    """g [S, N] of these adapters, 1 for one without a magnitude; None if none has one."""
    scaled = {name: _row_scale_of(layer, name) for name in adapters if name in layer.loraxs_magnitude}
    if not scaled:
        return None
    one = torch.ones_like(next(iter(scaled.values())))
    return torch.cat([scaled.get(name, one) for name in adapters])


def scaled_weight_delta(layer: LoraXSLayer, adapter: str, delta: Tensor) -> Tensor:
    """W' − W [N, K] for delta = s·B R A [N, K], in its dtype."""
    weight = layer.frozen_weight().to(delta)
    return _row_scale_of(layer, adapter).to(delta).mT * (weight + delta) - weight


def forward(layer: LoraXSLinear, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """y [..., N] of a layer that has adapters with a magnitude; `LoraXSLinear.forward` for all others."""
    if layer.route is not None:
        paths, g = layer.routed_path(x, layer.route), layer.route.scales
        if g is None:
            return layer.run(x, paths, args, kwargs)
        z = layer.run(x, paths, args, kwargs, with_bias=False)
        return ops.rescale(z, own_columns(g, layer.part(x, z)), paths[0].slots, layer.base_bias(z))

    magnitudes: Any = layer._modules["loraxs_magnitude"]
    active = [name for name in layer.active_adapters if name in layer.r]
    scaled = [(name, layer.active_paths([name])[0]) for name in active if name in magnitudes._modules]
    plain = len(active) > len(scaled)
    others = layer.active_paths([name for name in active if name not in magnitudes._modules]) if plain else []
    if not scaled:
        return layer.run(x, others, args, kwargs)
    name, path = scaled[0]
    if len(scaled) == 1 and not path.p_drop:
        z = layer.run(x, [path], args, kwargs, with_bias=False)
        g = own_columns(row_scale(layer, name, path.b, path.pages), layer.part(x, z))
        y = ops.rescale(z, g, None, layer.base_bias(z))
    else:
        if is_sharded(layer.get_base_layer()._parameters.get("weight")):
            raise ValueError(
                f"use_edora: {layer.key}: expected under tensor parallelism one active adapter with a magnitude, and "
                f"loraxs_dropout=0, got {len(scaled)} with a dropout of {path.p_drop}"
            )
        inputs = [F.dropout(x, path.p_drop) if path.p_drop else x for _, path in scaled]
        y = layer.run(x - sum(inputs), [], args, kwargs)
        for (name, path), dropped in zip(scaled, inputs, strict=True):
            z = layer.run(dropped, [path._replace(p_drop=0.0)], args, kwargs, with_bias=False, shared=False)
            y = y + ops.rescale(z, row_scale(layer, name, path.b, path.pages))
    for path in others:
        y = layer.add(y, x, path)
    return y
