"""What one backward pass at R = 0 says about every module: ∂L/∂R for the largest rank, and the norm of ∂L/∂W."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from loraxs_ext.layers import CoreMatrix, LoraXSLayer
from loraxs_ext.peft import LoraXSConfig, LoraXSModel

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]

GRADIENT_MEMORY = 2 << 30
# Relative to the largest: a basis in fp32 does not resolve smaller singular values.
NO_GAIN = 1e-7
_ADAPTER = "advice"
_ADDED_BY_INJECTION = ("peft_config", "_ddp_params_and_buffers_to_ignore")


@dataclass(frozen=True)
class ModuleGradient:
    """The gradient of one module over the calibration data, in the directions an adapter could move.

    Ranks are nested: what holds for rank r is read off the leading r × r block.

    Attributes:
        name: of the module.
        shape: (N, K) of its weight.
        halves: ∂L/∂R [2, r_max, r_max] at R = 0 and scaling 1, fp64, summed over every other batch from the first and
            from the second.
        gains: [r_max, r_max], fp64: ‖b_i‖·‖a_j‖, the length of the step in W that a unit step of R_ij makes. With the
            singular values in A or in B, those of column j or row i.
        energy: ‖∂L/∂W‖² of the summed gradient; None if it was not measured.
    """

    name: str
    shape: tuple[int, int]
    halves: Tensor
    gains: Tensor
    energy: float | None

    @property
    def rank_max(self) -> int:
        """The largest rank that was measured: at most min(N, K)."""
        return self.halves.shape[-1]

    def captured(self) -> list[float] | None:
        """‖UᵀGV‖² / ‖G‖² at every rank 1 … r_max, for unit singular vectors and G = ∂L/∂W; 0 for a zero gradient.

        Directions whose singular value vanishes beside the largest move nothing and are not captured.
        """
        if self.energy is None:
            return None
        unit = torch.where(self.gains > NO_GAIN * self.gains.max(), self.halves.sum(0) / self.gains, 0.0)
        return (leading_energies(unit) / (self.energy or 1.0)).tolist()

    def gained(self, half: int | None = None) -> list[float]:
        """‖∂L/∂R‖² at every rank 0 … r_max: the captured energy, each direction weighted with the square of its gain.

        Args:
            half: 0 or 1 for one half of the calibration data, None for all of it.
        """
        core = self.halves.sum(0) if half is None else self.halves[half]
        return [0.0, *leading_energies(core).tolist()]


def leading_energies(core: Tensor) -> Tensor:
    """Squared Frobenius norm [r] of every leading block of core [r, r]."""
    return core.double().square().cumsum(0).cumsum(1).diagonal()


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    output = model(**batch)
    return output["loss"] if isinstance(output, Mapping) else output.loss


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    config: LoraXSConfig,
    rank_max: int,
    *,
    loss: Loss = model_loss,
    gradient_memory: int = GRADIENT_MEMORY,
    progress: bool = True,
) -> list[ModuleGradient]:
    """Gradients of every module that `config` targets, in the order of the model, which is left as it was.

    One pass over the batches if the gradients of all targeted weights fit into `gradient_memory`, else one per group of
    modules that does; everything else that is kept is r_max² numbers a module.

    Args:
        model: without adapters; measured in eval mode.
        batches: calibration data; at least two, for two halves.
        config: targets and recipe of the bases. Its ranks, alphas and initial weights do not matter.
        rank_max: largest rank of interest; clamped to min(N, K) module by module.
        loss: (model, batch) -> scalar; gradients are those of its sum over the batches.
        gradient_memory: bytes for ∂L/∂W in fp32 (a single larger gradient is still measured); 0 leaves them out.
        progress: show a bar.

    Raises:
        ValueError: too few batches, a rank below 1, or a loss that is not finite or that no targeted module moves.
        RuntimeError: the input of a module was changed in place before the backward pass.
    """
    if len(batches) < 2:
        raise ValueError(f"batches: expected at least 2, to compare two halves of them, got {len(batches)}")
    if rank_max < 1:
        raise ValueError(f"rank_max: expected at least 1, got {rank_max}")
    probe = replace(
        config, r=rank_max, lora_alpha=rank_max, use_rslora=False, rank_pattern={}, alpha_pattern={},
        init_weights="zeros", loraxs_dropout=0.0, bias="none", save_basis=False, base_fingerprint=None,
    )  # fmt: skip
    halves: dict[str, Tensor] = {}
    energies: dict[str, float] = {}
    with _adapted(model, probe) as layers:
        groups = _groups(layers, gradient_memory)
        with tqdm(total=len(groups) * len(batches), desc="gradients", unit="batch", disable=not progress) as bar:
            for group in groups:
                # Every pass gives ∂L/∂R of all modules again, and to the same bits.
                halves, found = _pass(model, batches, loss, layers, group, bar)
                energies |= found
        gradients = [_gradient(name, layer, halves[name], energies.get(name)) for name, layer in layers.items()]
    if not any(gradient.halves.any() for gradient in gradients):
        raise ValueError("loss: expected one that depends on the targeted modules, got zero gradients for all of them")
    return gradients


def _pass(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    layers: Mapping[str, LoraXSLayer],
    group: Sequence[str],
    bar: tqdm,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """∂L/∂R of all layers by half, and ‖∂L/∂W‖² of those in `group`."""
    cores = {name: cast(CoreMatrix, layer.core(_ADAPTER)).weight for name, layer in layers.items()}
    halves = {name: torch.zeros(2, *core.shape, dtype=torch.float64) for name, core in cores.items()}
    with ExitStack() as hooks:
        sums = {name: hooks.enter_context(_weight_gradient(layers[name])) for name in group}
        for number, batch in enumerate(batches):
            value = loss(model, batch)
            if not torch.isfinite(value):
                raise ValueError(f"loss: expected a finite number for every batch, got {value.item()} for {number}")
            if value.requires_grad:
                value.backward()
            for name, core in cores.items():
                if core.grad is not None:
                    halves[name][number % 2] += core.grad.double().cpu()
                    core.grad = None
            bar.update()
        return halves, {name: float(total.double().square().sum()) for name, total in sums.items()}


@contextmanager
def _weight_gradient(layer: LoraXSLayer) -> Iterator[Tensor]:
    """A tensor [N, K] that sums ∂L/∂W = dyᵀ x over all backward passes; W itself stays frozen."""
    dtype = torch.promote_types(layer.basis_dtype, torch.float32)
    shape = (layer.out_features, layer.in_features)
    total = torch.zeros(shape, dtype=dtype, device=layer.get_base_layer_device())

    def watch(_: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        if not y.requires_grad:
            return
        x = inputs[0].detach()
        version = x._version

        def add(dy: Tensor) -> None:
            if x._version != version:
                raise RuntimeError(f"{layer.key}: input: expected to be unchanged until the backward pass, got another")
            total.addmm_(dy.detach().reshape(-1, shape[0]).to(dtype).mT, x.reshape(-1, shape[1]).to(dtype))

        y.register_hook(add)

    handle = layer.register_forward_hook(watch)
    try:
        yield total
    finally:
        handle.remove()


@contextmanager
def _adapted(model: nn.Module, config: LoraXSConfig) -> Iterator[dict[str, LoraXSLayer]]:
    """The layers of an adapter that is on the model, in eval mode with all else frozen, for as long as this lasts."""
    if any(hasattr(module, "peft_config") for module in model.modules()):
        raise ValueError("model: expected one without adapters, got a PEFT model; call unload() or merge_and_unload()")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    tuner = LoraXSModel(model, config, _ADAPTER)
    try:
        layers = {layer.key: layer for layer in model.modules() if isinstance(layer, LoraXSLayer)}
        model.requires_grad_(False)
        for layer in layers.values():
            layer.core(_ADAPTER).requires_grad_(True)
        model.eval()
        with torch.enable_grad():
            yield layers
    finally:
        tuner.unload()
        for name in _ADDED_BY_INJECTION:
            model.__dict__.pop(name, None)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


def _groups(layers: Mapping[str, LoraXSLayer], memory: int) -> list[list[str]]:
    """Names of layers whose weight gradients are held at once; a single empty group if none are wanted."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, layer in layers.items() if memory else ():
        size = layer.out_features * layer.in_features * max(4, layer.basis_dtype.itemsize)
        if groups[-1] and used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _gradient(name: str, layer: LoraXSLayer, halves: Tensor, energy: float | None) -> ModuleGradient:
    a, b = layer.get_basis(_ADAPTER)
    gains = torch.outer(b.double().norm(dim=0), a.double().norm(dim=1)).cpu()
    return ModuleGradient(name, (layer.out_features, layer.in_features), halves, gains, energy)
