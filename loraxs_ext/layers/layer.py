"""What every LoRA-XS layer owns: one frozen basis, one R per adapter, and their scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .core import Core, CoreMatrix, InitWeights, initial_core
from .edora import Magnitude, Norm, RowNorms
from .repacking import is_repacked, unpack
from .routing import Route
from .stacked import SharedProjection
from .tiny import TinyCore, TinyOptions, initial_vector


class BasisPolicy(Protocol):
    """How an adapter's basis is made and how strictly it is compared; supplied by the floor that knows both."""

    def settle(self, layer: LoraXSLayer) -> None:
        """Give `layer` the basis of the adapter that this policy was given for, express R on it, mark it settled.

        Raises:
            ValueError: R was trained on another basis.
        """


class LoraXSLayer(nn.Module, BaseTunerLayer):
    """State of a LoRA-XS layer; `LoraXSLinear` adds the arithmetic.

    The basis A [r, K] and Bᵀ [r, N] exists once, as plain buffers that no state dict sees. Rows are ordered by
    singular value, so an adapter of rank r uses the first r rows, whatever the ranks of the others. Two methods are
    meant to be overridden by relatives of LoRA-XS: `get_basis` and `get_R`.

    Args:
        base_layer: the frozen layer, possibly already wrapped by another tuner.
        key: name of the module in the model: seeds R, names the layer in messages.
        quantization: arguments of PEFT's quantisation backends.
    """

    adapter_layer_names: tuple[str, ...] = ("loraxs_R", "loraxs_magnitude")
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "initial_scaling",
        "multiplier",
        "loraxs_dropout",
        "basis_policy",
    )
    # What the adapters adapt.
    parameter_name: str = "weight"
    # Whether the forward pass may take x Aᵀ from its siblings.
    shares_projection: bool = True
    # How many matrices W the parameter stacks; None for one, which is not stacked.
    num_experts: int | None = None
    takes_magnitude: bool = False
    base_layer: nn.Module
    loraxs_A: Tensor | None
    loraxs_Bt: Tensor | None
    in_features: int
    out_features: int
    route: Route | None = None
    # `route.fused`, while adapters are enabled.
    fused: Callable[[Tensor], Tensor] | None = None
    siblings: SharedProjection | None = None
    base_fingerprint: str | None = None

    def __init__(self, base_layer: nn.Module, key: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.in_features, self.out_features = self.matrix_features(base)
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.multiplier: dict[str, float] = {}
        self.basis_policy: dict[str, BasisPolicy] = {}
        self.loraxs_dropout = nn.ModuleDict({})
        self.loraxs_R = nn.ModuleDict({})
        self.loraxs_magnitude = nn.ModuleDict({})
        self.loraxs_norms = nn.ModuleDict({})
        self.register_buffer("loraxs_A", None, persistent=False)
        self.register_buffer("loraxs_Bt", None, persistent=False)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # While adapters are merged: the parameter they replaced, or the quantised layer. In lists, so that neither is
        # registered and saved as a part of this layer.
        self.unmerged_weight: list[nn.Parameter] = []
        self.unmerged_base: list[nn.Module] = []

    def get_R(self, adapter: str) -> Tensor:
        """R [r, r] of `adapter`, differentiable in what the adapter trains. May be overridden."""
        modules: Any = self._modules
        return modules["loraxs_R"]._modules[adapter].matrix()

    def get_basis(self, adapter: str) -> tuple[Tensor, Tensor]:
        """a [r, K] and b [N, r] of `adapter`; b.mT is contiguous, for the ops. May be overridden."""
        a, bt = self.basis_rows(self.r[adapter])
        return a, bt.mT

    def basis_rows(self, r: int) -> tuple[Tensor, Tensor]:
        """The first r rows: a [r, K] and bt [r, N].

        Raises:
            RuntimeError: there is no basis, because the base layer has no weights yet.
        """
        a, bt = self._buffers["loraxs_A"], self._buffers["loraxs_Bt"]
        if a is None or bt is None:
            raise RuntimeError(f"{self.key}: base_layer: expected weights to compute a basis from, got the meta device")
        return (a, bt) if a.shape[-2] == r else (a[..., :r, :], bt[..., :r, :])

    @property
    def sites(self) -> Sequence[LoraXSLayer]:
        """What has one W, one basis and one R per adapter each: this layer, or its experts."""
        return (self,)

    @property
    def module(self) -> nn.Module:
        """The layer a site belongs to."""
        return self

    @property
    def weight_id(self) -> Hashable:
        """The same for sites that share one weight."""
        base = self.get_base_layer()
        return id(self.unmerged_weight[0] if self.unmerged_weight else getattr(base, self.parameter_name, base))

    def core(self, adapter: str) -> Core:
        """The module that makes R of `adapter`."""
        return cast(Core, self.loraxs_R[adapter])

    def update_layer(
        self,
        adapter: str,
        r: int,
        lora_alpha: float,
        *,
        policy: BasisPolicy,
        use_rslora: bool = False,
        dropout: float = 0.0,
        init_weights: InitWeights = True,
        init_std: float = 1e-5,
        init_seed: int = 0,
        keep_basis: bool = False,
        tiny: TinyOptions | None = None,
        inference_mode: bool = False,
        magnitude: Norm | None = None,
    ) -> None:
        """Add the adapter: its R, its scaling alpha/r (or alpha/√r), its dropout. The basis comes later, in `settle`.

        Args:
            adapter: name.
            r: configured rank; clamped to min(N, K), while the scaling keeps the configured value.
            lora_alpha: alpha.
            policy: where the basis comes from.
            use_rslora: divide alpha by √r.
            dropout: probability in [0, 1) on the input of the low-rank path.
            init_weights, init_std, init_seed: see `initial_core`, or `initial_vector`.
            keep_basis: store A and B with the adapter.
            tiny: make R of a short vector, as TinyLoRA does; None to train R itself.
            inference_mode: leave R frozen.
            magnitude: train m too (EDoRA), with the norm "detached" or "differentiated"; None for no magnitude.
        """
        if magnitude is not None and not self.takes_magnitude:
            raise TypeError(
                f"use_edora: {self.key}: expected a linear layer, got {type(self.get_base_layer()).__name__}; name it "
                f"in exclude_modules"
            )
        if tiny is not None and self.num_experts is not None:
            raise TypeError(f"use_tinylora: {self.key}: expected one matrix, got a stack of {self.num_experts}")
        rank = min(r, self.in_features, self.out_features)
        self.r[adapter] = rank
        self.set_alpha(adapter, lora_alpha, lora_alpha / (math.sqrt(r) if use_rslora else r))
        self.basis_policy[adapter] = policy
        self.loraxs_dropout[adapter] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        dtype = torch.float64 if self.basis_dtype == torch.float64 else torch.float32
        shape = (self.in_features, self.out_features) if keep_basis else None
        if tiny is None:
            cores = [
                initial_core(rank, init_weights, std=init_std, seed=init_seed, key=site.key, dtype=dtype)
                for site in self.sites
            ]
            weight = cores[0] if self.num_experts is None else torch.stack(cores)
            self.loraxs_R[adapter] = CoreMatrix(weight, shape)
        else:
            v = initial_vector(tiny, init_weights, seed=init_seed, key=self.key, dtype=dtype)
            self.loraxs_R[adapter] = TinyCore(v, rank, tiny.seed, shape, tiny.keep_projections)
        if magnitude is not None:
            self.loraxs_magnitude[adapter] = Magnitude(self.out_features, dtype, magnitude)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; also inside a mixed batch, whose short cut that ends."""
        super().enable_adapters(enabled)
        self.fused = None

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter, and with the last one the basis: the next may be made by another recipe."""
        super().delete_adapter(adapter_name)
        if not self.loraxs_R:
            self.loraxs_A = self.loraxs_Bt = None
        if not self.loraxs_magnitude:
            self.loraxs_norms.clear()

    def settle(self, adapter: str) -> None:
        """Make sure that R of `adapter` stands on the basis it was trained on; free once that is known."""
        if adapter in self.loraxs_R and not self.is_settled(adapter):
            settle_outside_of_graphs(self, adapter)

    def is_settled(self, adapter: str) -> bool:
        """Whether `adapter` stands on a basis it was compared with, and its norms are known if it needs them."""
        lacks_norms = adapter in self.loraxs_magnitude and str(self.r[adapter]) not in self.loraxs_norms
        return self.core(adapter).settled and not lacks_norms

    def settle_magnitudes(self, weight: Callable[[], Tensor]) -> None:
        """Make the norms that adapters with a magnitude need, where they are missing, and begin every new m with them.

        Args:
            weight: gives W [N, K].
        """
        ranks = {name: self.r[name] for name in self.loraxs_magnitude if self.r[name] <= self.basis_rank}
        norms = {int(r): cast(RowNorms, module) for r, module in self.loraxs_norms.items()}
        for r in sorted({*ranks.values()} - norms.keys(), reverse=True):
            wider = max(norms, default=0)
            if wider < r:
                dtype = torch.float64 if self.basis_dtype == torch.float64 else torch.float32
                a, _ = self.basis_rows(r)
                norms[r] = RowNorms.measure(weight().to(a.device), a, dtype)
            else:
                norms[r] = norms[wider].cut(r)
            self.loraxs_norms[str(r)] = norms[r]
        for name, r in ranks.items():
            cast(Magnitude, self.loraxs_magnitude[name]).start(norms[r].lengths())

    def train(self, mode: bool = True) -> LoraXSLayer:
        """Also settles what was loaded: the last eager moment before a compiled forward pass."""
        super().train(mode)
        for adapter in self.loraxs_R:
            self.settle(adapter)
        return self

    def set_basis(self, a: Tensor, bt: Tensor) -> None:
        """Install a [r, K] and bt [r, N], on the device and in the dtype of the base layer."""
        expected = (self.in_features, self.out_features)
        if a.dim() != 2 or bt.dim() != 2 or a.shape[0] != bt.shape[0] or (a.shape[1], bt.shape[1]) != expected:
            raise ValueError(
                f"{self.key}: basis: expected a [r, {expected[0]}] and bt [r, {expected[1]}], "
                f"got {list(a.shape)} and {list(bt.shape)}"
            )
        device, dtype = self.get_base_layer_device(), self.basis_dtype
        self.loraxs_A = a.detach().to(device, dtype).contiguous()
        self.loraxs_Bt = bt.detach().to(device, dtype).contiguous()
        self.loraxs_norms.clear()

    def share_basis(self, other: LoraXSLayer) -> None:
        """Take the basis of `other`, a layer over the same weight, without a copy."""
        if other is not self:
            self.loraxs_A, self.loraxs_Bt = other.loraxs_A, other.loraxs_Bt
            self.loraxs_norms.clear()

    @property
    def basis_rank(self) -> int:
        """Rows of the basis; 0 before there is one."""
        return 0 if self.loraxs_A is None else self.loraxs_A.shape[-2]

    @property
    def basis_dtype(self) -> torch.dtype:
        """The dtype the base layer computes in; fp32 where it does not say."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else torch.float32

    def get_base_layer_device(self) -> torch.device:
        """Where the base layer computes: for one whose weights accelerate offloads, where they are brought to."""
        base = self.get_base_layer()
        device, _ = self._get_base_layer_device_and_dtype(base)
        if device is not None and device.type == "meta" and hasattr(base, "_hf_hook"):
            device = getattr(base._hf_hook, "execution_device", None) or device
        return torch.device("cpu") if device is None else torch.device(device)

    def matrix_features(self, base: nn.Module) -> tuple[int, int]:
        """K and N of the matrix that stands for the weight of `base`. May be overridden."""
        if isinstance(base, nn.Linear):
            # As declared: of a weight that tensor parallelism divides, PEFT's version gives the part.
            return base.in_features, base.out_features
        return cast(tuple[int, int], _get_in_out_features(base))

    def as_matrix(self, stored: Tensor) -> Tensor:
        """W [N, K] of a weight in the layout of the base layer. May be overridden, with `as_stored`."""
        return stored.mT if self.fan_in_fan_out else stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix [N, K] in the layout of the base layer."""
        return matrix.mT if self.fan_in_fan_out else matrix

    def frozen_weight(self) -> Tensor:
        """W [N, K] of the base layer without any adapter, dequantised."""
        if self.quantization_backend is None:
            return self.as_matrix(self.unmerged_weight[0].data if self.unmerged_weight else self.stored_weight())
        base: Any = self.unmerged_base[0] if self.unmerged_base else self.base_layer
        while hasattr(base, "base_layer"):
            base = base.base_layer
        if is_repacked(base):
            unpack(base)
        return self.quantization_backend.get_base_weight(base)

    def stored_weight(self) -> Tensor:
        """The weight the base layer has at the moment, merged or not, dequantised but in its own layout."""
        return self.get_base_weight()

    def check_mergeable(self) -> None:
        """Raise if there is no weight that could take the adapters up. May be overridden."""

    def set_alpha(self, adapter: str, lora_alpha: float, scaling: float) -> None:
        """Set alpha of `adapter` and the scaling that follows from it, which nothing multiplies any more."""
        self.lora_alpha[adapter], self.multiplier[adapter] = lora_alpha, 1.0
        self.scaling[adapter] = self.initial_scaling[adapter] = scaling

    def is_rescaled(self, adapter: str) -> bool:
        """Whether the scaling was written past the methods below; PEFT's hotswap does that."""
        return self.scaling[adapter] != self.multiplier[adapter] * self.initial_scaling[adapter]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scaling of `adapter` = `scale` times its initial scaling; an adapter this layer lacks is ignored."""
        if adapter in self.scaling:
            self.settle(adapter)
            self.multiplier[adapter] = scale
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.settle(adapter)
                self.set_scale(adapter, self.multiplier[adapter] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; None resets it to the initial one."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.settle(adapter)
                self.set_scale(adapter, 1.0 if scale is None else self.multiplier[adapter] / scale)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: W' = W + ΔW. lora_A = R A and lora_B = B is the same adapter; with a magnitude, a ΔW of full rank is
        approximated as well as the rank of the LoRA allows."""
        return True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the dtype of the base layer, which would round R of a half-precision model.
        target = device or self.get_base_layer_device()
        if adapter_name in self.loraxs_R and "meta" not in (self.core(adapter_name).device.type, target.type):
            self.core(adapter_name).to(target)
            if adapter_name in self.loraxs_magnitude:
                self.loraxs_magnitude[adapter_name].to(target)

    def __getstate__(self) -> dict[str, Any]:
        # Routes point at memory of this process, and a copy would keep them when the context ends.
        if self.route is not None:
            raise RuntimeError(
                "model: expected to be copied or saved outside of adapters() and token_slots(), got it inside"
            )
        return vars(self)

    def _apply(self, fn: Any, recurse: bool = True) -> LoraXSLayer:
        before = self.basis_dtype
        super()._apply(fn, recurse)
        if self.basis_dtype != before or any(kept.is_meta for kept in self.loraxs_norms.buffers()):
            # They belong to the weights as they were: measured again when next needed.
            self.loraxs_norms.clear()
        return self


@torch.compiler.disable(reason="call model.eval() or model.train() after loading an adapter into a compiled model")
def settle_outside_of_graphs(layer: LoraXSLayer, adapter: str) -> None:
    """`BasisPolicy.settle`, kept out of compiled graphs: it compares numbers on the host and may raise."""
    layer.basis_policy[adapter].settle(layer)
