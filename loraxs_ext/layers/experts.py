"""The LoRA-XS layer over a parameter that no layer of its own holds, such as the stacked weights of experts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .core import CoreMatrix
from .layer import LoraXSLayer
from .linear import LoraXSLinear
from .routing import pad
from .sharding import is_sharded


# PEFT recognises nested wrappers of parameters by this name of their class.
class ParamWrapper(LoraXSLinear):
    """Calls a module with W + s·B R A in the place of one of its parameters W.

    W is [N, K], or a stack [E, N, K] ([E, K, N] where the module says `is_transposed`) with a basis and an R for every
    expert: A [E, r, K], Bᵀ [E, r, N], R [E, r, r]. One batched product a call makes the adapted stack, the only tensor
    of that size. Like a merged weight it is rounded to the dtype of W.

    Parameters of one module are wrapped one around the other.

    Args:
        base_layer: the module that holds the parameter, or the wrapper of another parameter of it.
        key: name of the parameter in the model.
        adapter: name of the first adapter.
        parameter_name: name of the parameter in its module.
        options: arguments of `update_layer`.
    """

    shares_projection = False
    takes_magnitude = False

    def __init__(self, base_layer: nn.Module, key: str, adapter: str, parameter_name: str, **options: Any) -> None:
        self.parameter_name = parameter_name
        self.fingerprints: list[str | None] = []
        self.basis_ranks: list[int] = []
        super().__init__(base_layer, key, adapter, {}, **options)

    def matrix_features(self, base: nn.Module) -> tuple[int, int]:
        """K and N, and the number of experts.

        Raises:
            TypeError: the parameter is not a floating-point matrix or stack of matrices.
        """
        weight = getattr(base, self.parameter_name)
        if weight.ndim not in (2, 3) or not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise TypeError(
                f"target_parameters: {self.key}: expected [N, K] or [E, N, K] of a floating-point dtype, got "
                f"{list(weight.shape)} of {weight.dtype}"
            )
        self.is_transposed = weight.ndim == 3 and bool(getattr(base, "is_transposed", False))
        if weight.ndim == 3:
            self.num_experts = weight.shape[0]
            self.fingerprints = [None] * len(weight)
        n, k = self.as_matrix(weight).shape[-2:]
        return k, n

    def as_matrix(self, stored: Tensor) -> Tensor:
        """W [N, K] or [E, N, K] of the parameter."""
        return stored.mT if self.is_transposed else stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        """The parameter of W [N, K] or [E, N, K]."""
        return matrix.mT if self.is_transposed else matrix

    def stored_weight(self) -> Tensor:
        """The parameter as it is at the moment."""
        return getattr(self.get_base_layer(), self.parameter_name).data

    @property
    def sites(self) -> Sequence[LoraXSLayer]:
        """The experts."""
        if self.num_experts is None:
            return (self,)
        return [cast(LoraXSLayer, Expert(self, index)) for index in range(self.num_experts)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module with the adapted parameter.

        Raises:
            ValueError: rows of the batch are to be served by adapters of their own.
        """
        adapters = [] if self.is_bare() else [name for name in self.active_adapters if name in self.loraxs_R]
        if self.route is not None:
            if self.route.pages is not None:
                raise ValueError(
                    f"adapter_names: {self.key}: expected adapters without target_parameters in a mixed batch, whose "
                    f"rows would need weights of their own, got one with them; use set_adapter"
                )
            adapters = []
        if not adapters:
            return self.base_layer(*args, **kwargs)
        name = self.parameter_name
        inner = self.base_layer
        while isinstance(inner, ParamWrapper):
            name, inner = f"base_layer.{name}", inner.base_layer
        adapted = {name: self._adapted(adapters)}
        return functional_call(self.base_layer, adapted, args, kwargs, tie_weights=False)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module itself, for PEFT: merged in all its wrapped parameters, or as it was."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts layers that are called with x."""
        return False

    def _adapted(self, adapters: list[str]) -> Tensor:
        for name in adapters:
            self.settle(name)
        widest = max(adapters, key=self.r.__getitem__)
        core = reduce(torch.add, [pad(self.get_R(name) * self.scaling[name], self.r[widest]) for name in adapters])
        weight = getattr(self.get_base_layer(), self.parameter_name)
        if is_sharded(weight):
            raise TypeError(
                f"target_parameters: {self.key}: expected a parameter that this process has completely when its module "
                f"is called, got one that tensor or expert parallelism divides"
            )
        a, b = self.get_basis(widest)
        with torch.autocast(weight.device.type, enabled=False):
            left = (b.to(core.dtype) @ core).to(weight.dtype)
            # In the layout of the parameter: a transposed sum would be copied by those who read it.
            left, right = (a.mT, left.mT) if self.is_transposed else (left, a)
            if self.num_experts is None:
                return torch.addmm(weight, left, right)
            return torch.baddbmm(weight, left, right)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = getattr(base_layer, self.parameter_name)
        return weight.device, weight.dtype


class Expert:
    """One matrix of a stack, in the part of a layer: what the owner of bases asks of one.

    Args:
        layer: of the stack.
        index: of the expert in it.
    """

    quantization_backend = None

    def __init__(self, layer: ParamWrapper, index: int) -> None:
        self.module = self.layer = layer
        self.index = index
        self.key = f"{layer.key}.{index}"
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.r, self.loraxs_R = layer.r, layer.loraxs_R
        self.get_base_layer, self.get_base_layer_device = layer.get_base_layer, layer.get_base_layer_device

    @property
    def base_fingerprint(self) -> str | None:
        """Of W, once it was computed."""
        return self.layer.fingerprints[self.index]

    @base_fingerprint.setter
    def base_fingerprint(self, fingerprint: str | None) -> None:
        self.layer.fingerprints[self.index] = fingerprint

    @property
    def weight_id(self) -> Hashable:
        """An expert of its own."""
        return self.layer.weight_id, self.index

    @property
    def basis_rank(self) -> int:
        """Rows of the basis; 0 before there is one."""
        return 0 if self.layer.loraxs_A is None else self.layer.basis_ranks[self.index]

    def core(self, adapter: str) -> CoreMatrix:
        """R of this expert."""
        return cast(CoreMatrix, ExpertCore(cast(CoreMatrix, self.layer.core(adapter)), self.index))

    def is_settled(self, adapter: str) -> bool:
        """See `LoraXSLayer.is_settled`; experts are settled all at once."""
        return self.layer.is_settled(adapter)

    def settle_magnitudes(self, weight: Callable[[], Tensor]) -> None:
        """Expert parameters have no magnitudes."""

    def frozen_weight(self) -> Tensor:
        """W [N, K] without any adapter."""
        return self.layer.frozen_weight()[self.index]

    def basis_rows(self, r: int) -> tuple[Tensor, Tensor]:
        """The first r rows: a [r, K] and bt [r, N]."""
        a, bt = self.layer.basis_rows(r)
        return a[self.index], bt[self.index]

    def set_basis(self, a: Tensor, bt: Tensor) -> None:
        """Install a [r, K] and bt [r, N]."""
        layer, r = self.layer, len(a)
        if layer.loraxs_A is None:
            layer.basis_ranks = [0] * len(layer.fingerprints)
        if layer.basis_rank < r:
            layer.loraxs_A = self._grown(layer.loraxs_A, r, self.in_features)
            layer.loraxs_Bt = self._grown(layer.loraxs_Bt, r, self.out_features)
        stored_a, stored_bt = cast(Tensor, layer.loraxs_A), cast(Tensor, layer.loraxs_Bt)
        stored_a[self.index, :r] = a
        stored_bt[self.index, :r] = bt
        layer.basis_ranks[self.index] = r

    def share_basis(self, owner: LoraXSLayer) -> None:
        """Copy the basis of `owner`, of which there is one: this expert itself."""

    def _grown(self, old: Tensor | None, r: int, width: int) -> Tensor:
        layer = self.layer
        new = torch.zeros(
            len(layer.fingerprints), r, width, dtype=layer.basis_dtype, device=layer.get_base_layer_device()
        )
        if old is not None:
            new[:, : old.shape[1]] = old
        return new


class ExpertCore:
    """One R of a stack, in the part of a `CoreMatrix`.

    Args:
        stack: the R of all experts.
        index: of the expert.
    """

    def __init__(self, stack: CoreMatrix, index: int) -> None:
        self.stack, self.index, self.rank = stack, index, stack.rank

    @property
    def settled(self) -> bool:
        """See `CoreMatrix.settled`; experts are settled all at once."""
        return self.stack.settled

    @property
    def weight(self) -> Tensor:
        """R [r, r], a view that writes through."""
        return self.stack.weight.detach()[self.index]

    @property
    def on_basis(self) -> Tensor:
        """R [r, r]."""
        return self.weight

    def place(self, moved: Tensor) -> None:
        """R = `moved` [r, r]."""
        self.weight.copy_(moved)

    @property
    def device(self) -> torch.device:
        """That of R."""
        return self.stack.device

    @property
    def recorded_sketch(self) -> Tensor:
        """[5, r]."""
        return self.stack.recorded_sketch[self.index]

    @property
    def stored_basis(self) -> tuple[Tensor, Tensor] | None:
        """a [r, K] and bt [r, N] that came with R, if any."""
        stored = self.stack.stored_basis
        return None if stored is None else (stored[0][self.index], stored[1][self.index])

    def record(self, sketch: Tensor, a: Tensor, bt: Tensor) -> None:
        """See `CoreMatrix.record`."""
        for name, value in (("sketch", sketch), ("a", a), ("bt", bt)):
            stored = self.stack._buffers.get(name)
            if stored is not None:
                stored[self.index] = value
        self.stack.settled = True
