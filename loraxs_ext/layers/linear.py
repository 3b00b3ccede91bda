"""The LoRA-XS layer over a linear base layer: forward, mixed batches, merge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from loraxs_ext import ops

from . import edora
from .layer import LoraXSLayer
from .merge import LOSS_WORTH_A_WARNING, MergeLossWarning, delta_weight, rounding_loss
from .path import LowRankPath, add_path, draw_rng
from .probing import straight_through
from .routing import Route, pad
from .sharding import is_sharded
from .stacked import SHARE_ON_CPU
from .tensor_parallel import Part, add_partial_path, agreed_rng, find_part, local_bias, mesh_group


class LoraXSLinear(LoraXSLayer):
    """y = base(x) + s·((drop(x) Aᵀ) Rᵀ) Bᵀ over nn.Linear, Conv1D, quantised linear layers and other tuners' layers.

    A plain frozen nn.Linear runs in one fused op. Anything else is called as it is and gets the low-rank part added,
    so that its hooks, kernels and trainable parameters keep working.

    Args:
        base_layer, key, quantization: see `LoraXSLayer`.
        adapter: name of the first adapter.
        options: arguments of `update_layer`.
    """

    takes_magnitude = True

    def __init__(
        self, base_layer: nn.Module, key: str, adapter: str, quantization: dict[str, Any], **options: Any
    ) -> None:
        super().__init__(base_layer, key, **quantization)
        self._active_adapter = adapter
        self.update_layer(adapter, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` between the hooks; at once what serving prepared, where nobody looks on."""
        # A compiler must not even look at `fused`, which is another in every batch.
        if (
            is_compiling()
            or (fused := self.fused) is None
            or kwargs
            or len(args) != 1
            or self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or has_global_hooks()
        ):
            return super().__call__(*args, **kwargs)
        return fused(args[0])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., N] for x [..., K]; further arguments go to the base layer."""
        # Here and in what this calls, parts are taken from the dictionaries of nn.Module: its attribute look-up costs
        # about as much as the low-rank arithmetic of one token, and a decoder asks hundreds of layers for every token.
        if self.is_bare():
            return self.base_layer(x, *args, **kwargs)
        magnitudes: Any = self._modules["loraxs_magnitude"]
        if magnitudes._modules:
            return edora.forward(self, x, args, kwargs)
        return self.run(x, self.paths(x), args, kwargs)

    def run(
        self,
        x: Tensor,
        paths: list[LowRankPath],
        args: tuple,
        kwargs: dict[str, Any],
        *,
        with_bias: bool = True,
        shared: bool = True,
    ) -> Tensor:
        """base(x) and the low-rank paths added to it.

        Args:
            x: [..., K].
            paths: what to add; the first of them fuses with a plain base layer.
            args, kwargs: further arguments of the base layer.
            with_bias: False leaves the bias of the base layer out.
            shared: whether x is what the layer was called with, which its siblings may have been called with too.
        """
        base: Any = self._modules["base_layer"]
        if paths and type(base) is nn.Linear and not (args or kwargs) and is_fusable(base, x, paths[0].a.dtype):
            (a, b, pages, slots, scale, p_drop), *paths = paths
            frozen: Any = base._parameters
            weight, bias = frozen["weight"], frozen["bias"] if with_bias else None
            p = None
            # A compiler sees through separate projections, and each layer drops other entries of x.
            sharing = shared and self.siblings is not None and not p_drop and (x.is_cuda or SHARE_ON_CPU)
            if sharing and self.siblings is not None and not is_compiling():
                p = self.siblings.take(self, x, a)
            if p is not None:
                y = ops.linear_projected(x, weight, bias, p, a, b, pages, slots, scale)
            else:
                rng = draw_rng(x) if p_drop else None
                y = ops.linear(x, weight, bias, a, b, pages, slots, scale, p_drop=p_drop, rng=rng)
        else:
            y = straight_through(self.frozen_weight, x, base(x, *args, **kwargs))
            bias = None if with_bias else self.base_bias(y)
            if bias is not None:
                y = y - bias
        for path in paths:
            y = self.add(y, x, path)
        return y

    def add(self, y: Tensor, x: Tensor, path: LowRankPath) -> Tensor:
        """`add_path`, of the part that this process has under tensor parallelism."""
        part = self.part(x, y)
        if part is not None:
            return add_partial_path(y, x, path, part)
        weight = self.get_base_layer()._parameters.get("weight") if path.p_drop else None
        return add_path(y, x, path, agreed_rng(x, mesh_group(weight)) if is_sharded(weight) else None)

    def part(self, x: Tensor, y: Tensor) -> Part | None:
        """What of W the base layer turned x into y with, under tensor parallelism; None for all of it."""
        if type(y) is Tensor and (y.shape[-1], x.shape[-1]) == (self.out_features, self.in_features):
            return None
        return find_part(self.get_base_layer(), self.key, x, y, (self.out_features, self.in_features))

    def base_bias(self, y: Tensor) -> Tensor | None:
        """The bias [N] of the base layer in the dtype of y, or None."""
        base: Any = self._modules["base_layer"]
        bias = base._parameters["bias"] if type(base) is nn.Linear else getattr(self.get_base_layer(), "bias", None)
        if bias is not None and bias.is_meta:
            # Offloaded: it is there while the layer is called only.
            bias = base(y.new_zeros(1, self.in_features))[0]
        return None if bias is None else local_bias(bias, y).to(y.dtype)

    def is_bare(self) -> bool:
        """Whether the base layer is all there is to call: adapters are merged, or disabled (and unmerged here)."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        return self._disable_adapters or bool(self.merged_adapters)

    def paths(self, x: Tensor) -> list[LowRankPath]:
        """What is added to the output of the base layer for x [..., K]."""
        return self.active_paths(self.active_adapters) if self.route is None else self.routed_path(x, self.route)

    def active_paths(self, active: Iterable[str]) -> list[LowRankPath]:
        """One path per dropout probability among the active adapters, hence nearly always one."""
        modules: Any = self._modules
        cores, dropouts = modules["loraxs_R"]._modules, modules["loraxs_dropout"]._modules
        by_p: dict[float, list[str]] = {}
        for adapter in active:
            if adapter in cores:
                if not cores[adapter].settled:
                    self.settle(adapter)
                dropout = dropouts[adapter]
                p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
                by_p.setdefault(p, []).append(adapter)
        return [self._sum_path(adapters, p) for p, adapters in by_p.items()]

    def _sum_path(self, adapters: list[str], p_drop: float) -> LowRankPath:
        """The adapters' sum as one path: bases are nested, so Σ s·B R A is the path of Σ s·R."""
        if len(adapters) == 1:
            (adapter,) = adapters
            a, b = self.get_basis(adapter)
            return LowRankPath(a, b, self.get_R(adapter).unsqueeze(0), None, self.scaling[adapter], p_drop)
        widest = adapters[0]
        for adapter in adapters:
            if self.r[adapter] > self.r[widest]:
                widest = adapter
        cores = [pad(self.get_R(adapter) * self.scaling[adapter], self.r[widest]) for adapter in adapters]
        return LowRankPath(*self.get_basis(widest), torch.stack(cores).sum(0, keepdim=True), p_drop=p_drop)

    def routed_path(self, x: Tensor, route: Route) -> list[LowRankPath]:
        if route.pages is None:
            return []
        basis = route.basis_of(self)
        return [LowRankPath(*basis, route.pages, route.rows.per_token(x), route.scale, route.p_drop)]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW = W' − W in the layout of the base weight, in fp32 (fp64 for an fp64 base)."""
        return self.as_stored(self._weight_delta(adapter))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + Σ ΔW in the place of W; the sum is rounded once.

        W itself is kept, so `unmerge` restores it bit by bit; a merged layer therefore holds its weight twice until
        it is unmerged or unloaded. A weight shared with other modules stays theirs, unmerged.

        Args:
            safe_merge: refuse a merged weight that is not finite.
            adapter_names: which adapters; None for the active ones.

        Raises:
            ValueError: `safe_merge` found NaN or Inf.
            RuntimeError: the rows of a batch have adapters of their own now (`loraxs_ext.adapters`).
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loraxs_R]
        if not adapters:
            return
        if self.route is not None:
            raise RuntimeError(f"{self.key}: expected to be merged outside of a mixed batch, got a call inside")
        self.check_mergeable()
        frozen = self.frozen_weight()
        deltas = (self._weight_delta(name).to(frozen.device) for name in [*self.merged_adapters, *adapters])
        delta = reduce(torch.add, deltas)
        merged = (frozen.to(delta.dtype) + delta).to(frozen.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapters} seems to be broken")
        self._replace_weight(self.as_stored(merged).contiguous())
        self.merged_adapters.extend(adapters)
        loss = rounding_loss(frozen, delta, self.as_matrix(self.stored_weight()))
        if loss > LOSS_WORTH_A_WARNING:
            warnings.warn(MergeLossWarning(self.key, loss), stacklevel=2)

    def check_mergeable(self) -> None:
        """Refuse a weight of which this process has a shard.

        Raises:
            TypeError: there is one.
        """
        if is_sharded(getattr(self.get_base_layer(), self.parameter_name, None)):
            raise TypeError(
                f"{self.key}: base_layer: expected a complete weight to merge into, got one that is sharded between "
                f"processes; save the adapter and merge it in one process"
            )

    def unmerge(self) -> None:
        """Put the original weight back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        # The model may have moved since: the original follows.
        if self.unmerged_base:
            device = self.get_base_layer_device()
            self.base_layer = self.unmerged_base.pop().to(device)
        else:
            base, name = self.get_base_layer(), self.parameter_name
            merged, weight = getattr(base, name), self.unmerged_weight.pop()
            weight.data = weight.data.to(merged.device, merged.dtype)
            setattr(base, name, weight)

    def _weight_delta(self, adapter: str) -> Tensor:
        self.settle(adapter)
        delta = delta_weight(*self.get_basis(adapter), self.get_R(adapter), self.scaling[adapter])
        return edora.scaled_weight_delta(self, adapter, delta) if adapter in self.loraxs_magnitude else delta

    def _replace_weight(self, merged: Tensor) -> None:
        """Store `merged` (in the layout of the base layer) and keep what it replaces."""
        if self.quantization_backend is None:
            base, name = self.get_base_layer(), self.parameter_name
            weight = getattr(base, name)
            if not self.unmerged_weight:
                self.unmerged_weight.append(weight)
            setattr(base, name, nn.Parameter(merged, requires_grad=weight.requires_grad))
        else:
            # Quantised layers keep state beside the weight, each kind its own: set the whole layer aside.
            before = self.base_layer
            self.base_layer = copy.deepcopy(self.unmerged_base[0] if self.unmerged_base else before)
            try:
                self.set_base_weight(merged)
            except Exception:
                self.base_layer = before
                raise
            if not self.unmerged_base:
                self.unmerged_base.append(before)

    def extra_repr(self) -> str:
        """Ranks of the adapters and of the basis, and the quantisation backend where there is one."""
        parts = [*(f"{name}: r={r}" for name, r in self.r.items()), f"basis_rank={self.basis_rank}"]
        return ", ".join(filter(None, [*parts, quantization_extra_repr(self)]))

    def __repr__(self) -> str:
        return "loraxs." + super().__repr__()


def is_fusable(base: nn.Linear, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether calling `base` means x Wᵀ + bias and nothing else, in the dtype of the basis."""
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter or "forward" in base.__dict__:
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if weight.requires_grad and torch.is_grad_enabled():
        return False
    return weight.dtype == dtype and (x.dtype == dtype or torch.is_autocast_enabled(x.device.type))
