"""LoRA → LoRA-XS: the part of a trained LoRA that lies in the basis, and how much does not.

R = B⁺ ΔW A⁺ is the best R for a given basis (least squares), but a LoRA is free to leave it, and does. What is lost is
reported; use the result to start training from, or for a LoRA that was made within the basis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from loraxs_ext.files import atomic_folder
from loraxs_ext.layers import CoreMatrix, LoraXSLayer
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.transport import relative_distance, transport

from .lora_folder import LoraFolder, LoraModule, delta_norm, read_lora
from .streaming import StreamedModel, empty_base, load_tensors

DEFAULT_THRESHOLD = 0.1


class ModuleResidual(NamedTuple):
    """What of the ΔW of one module could not be expressed.

    Attributes:
        key: name of the module.
        rank: of R; 0 where the adapter has none for this module.
        residual: ‖ΔW − s·B R A‖ / ‖ΔW‖; at most 1 for a projection.
        norm: ‖ΔW‖.
    """

    key: str
    rank: int
    residual: float
    norm: float


class Projection(NamedTuple):
    """How much of a LoRA a projection kept.

    Attributes:
        modules: one entry per module of the LoRA.
    """

    modules: tuple[ModuleResidual, ...]

    @property
    def residual(self) -> float:
        """Of all modules together: √(Σ ‖ΔW − s·B R A‖² / Σ ‖ΔW‖²)."""
        total = sum(module.norm**2 for module in self.modules)
        lost = sum((module.residual * module.norm) ** 2 for module in self.modules)
        return math.sqrt(lost / total) if total else 0.0

    def __str__(self) -> str:
        worst = max(self.modules, key=lambda module: module.residual)
        return (
            f"the residual of {len(self.modules)} modules is {self.residual:.3f} of ‖ΔW‖ "
            f"(worst: {worst.key}, {worst.residual:.3f} at rank {worst.rank})"
        )


class ProjectionError(ValueError):
    """A projection would have lost more than the threshold allows.

    Attributes:
        projection: what it would have kept.
    """

    def __init__(self, projection: Projection, threshold: float) -> None:
        self.projection = projection
        super().__init__(
            f"threshold: expected a residual of at most {threshold:g}, got a LoRA that lies mostly outside the basis: "
            f"{projection}. Raise the rank, or accept the loss with threshold=1 and train further."
        )


def from_lora(
    model: nn.Module,
    folder: str | Path,
    config: LoraXSConfig | None = None,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    adapter_name: str = "default",
) -> PeftModel:
    """Project a plain PEFT LoRA on the basis of LoRA-XS: R = B⁺ ΔW A⁺ / s, without ever forming ΔW.

    Args:
        model: base model of the LoRA, or a PeftModel with LoRA-XS adapters, which gets one more.
        folder: of the LoRA, in safetensors; rank_pattern, alpha_pattern, rsLoRA, Conv1D and modules_to_save are
            understood, DoRA and other variants refused by name.
        config: rank, alpha and recipe; targets, task and heads are those of the LoRA where it has None. By default
            that of rank 8.
        threshold: largest accepted residual ‖ΔW − s·B R A‖ / ‖ΔW‖ of all modules together; 1 accepts anything.
        adapter_name: of the new adapter.

    Returns:
        The PeftModel; its R can be trained on. `residuals(model, folder)` tells what each module kept.

    Raises:
        ProjectionError: the residual is above the threshold; the model is as it was.
        ValueError: the folder holds no such LoRA, or the LoRA does not fit the model.
    """
    lora = read_lora(Path(folder))
    adapted = isinstance(model, PeftModel)
    peft_model = _adapt(model, configure(lora, config), adapter_name)
    try:
        layers = {layer.key: layer for layer in _layers(peft_model, adapter_name)}
        _check_fit(lora, peft_model)
        found = [project(layer, adapter_name, lora.modules.get(key)) for key, layer in layers.items()]
        projection = _complete(found, lora)
        if not projection.residual <= threshold:
            raise ProjectionError(projection, threshold)
        _load_others(peft_model, lora, adapter_name)
    except Exception:
        if adapted:
            peft_model.delete_adapter(adapter_name)
        else:
            peft_model.unload()
        raise
    return peft_model


def residuals(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> Projection:
    """How far an adapter of `model` is from the LoRA in `folder`, module by module.

    Raises:
        ValueError: the folder holds no such LoRA, or the LoRA does not fit the model.
    """
    lora = read_lora(Path(folder))
    layers = {layer.key: layer for layer in _layers(model, adapter_name)}
    _check_fit(lora, model)
    found = [distance(layer, adapter_name, lora.modules.get(key)) for key, layer in layers.items()]
    return _complete(found, lora)


def import_lora(
    base: Path,
    folder: Path,
    output: Path,
    config: LoraXSConfig | None = None,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    overwrite: bool = False,
    progress: bool = True,
) -> Projection:
    """`from_lora` from folder to folder, one base weight at a time.

    Raises:
        ProjectionError, ValueError, FileExistsError: as `from_lora`, or `output` exists; nothing is written then.
    """
    with atomic_folder(output, overwrite=overwrite) as temporary:
        lora = read_lora(folder)
        peft_model = _adapt(empty_base(base, folder), configure(lora, config), "default")
        model = StreamedModel(base, peft_model)
        _check_fit(lora, peft_model)
        try:
            found = [project(layer, "default", lora.modules.get(layer.key)) for layer in model.visit(progress=progress)]
        finally:
            model.close()
        projection = _complete(found, lora)
        if not projection.residual <= threshold:
            raise ProjectionError(projection, threshold)
        _load_others(peft_model, lora, "default", assign=True)
        peft_model.peft_config["default"].base_model_name_or_path = str(base)
        peft_model.save_pretrained(str(temporary))
    return projection


def configure(lora: LoraFolder, config: LoraXSConfig | None) -> LoraXSConfig:
    """`config` with the targets, the task and the heads of the LoRA where it says nothing, and with R = 0.

    Raises:
        ValueError: it asks for another method than LoRA-XS.
    """
    config = LoraXSConfig() if config is None else config
    for relative in ("use_edora", "use_tinylora"):
        if getattr(config, relative, False):
            raise ValueError(f"{relative}: expected False, for a LoRA has no such parameters, got True")
    changes: dict[str, Any] = {"init_weights": "zeros"}
    names = ["task_type", "modules_to_save"]
    if config.target_modules is None:
        names += ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"]
    for name in names:
        if getattr(config, name) is None:
            changes[name] = lora.fields.get(name)
    return dataclasses.replace(config, **changes)


@torch.no_grad()
def project(layer: LoraXSLayer, adapter: str, lora: LoraModule | None) -> ModuleResidual:
    """Set R of `adapter` to the projection of the LoRA's ΔW; to zero where the LoRA has none.

    Raises:
        ValueError: the LoRA has other sizes than the layer.
    """
    core, rank = cast(CoreMatrix, layer.core(adapter)).weight, layer.r[adapter]
    if lora is None:
        core.zero_()
        return ModuleResidual(layer.key, rank, 0.0, 0.0)
    expected = (layer.in_features, layer.out_features)
    if (lora.a.shape[1], lora.b.shape[0]) != expected:
        raise ValueError(
            f"{layer.key}: expected a LoRA for K, N = {expected}, got {(lora.a.shape[1], lora.b.shape[0])}"
        )
    a, b = layer.get_basis(adapter)
    identity = torch.eye(len(lora.a), dtype=torch.float64, device=a.device) * (lora.scale / layer.scaling[adapter])
    core.copy_(transport(identity, (lora.a, lora.b.mT), (a, b.mT))[0])
    return distance(layer, adapter, lora)


@torch.no_grad()
def distance(layer: LoraXSLayer, adapter: str, lora: LoraModule | None) -> ModuleResidual:
    """How far s·B R A of `adapter` is from the LoRA's ΔW."""
    rank = layer.r[adapter]
    if lora is None:
        return ModuleResidual(layer.key, rank, 0.0, 0.0)
    a, b = layer.get_basis(adapter)
    whole = torch.eye(len(lora.a), dtype=torch.float64, device=a.device) * lora.scale
    kept = layer.get_R(adapter).double() * layer.scaling[adapter]
    residual = relative_distance((lora.a, whole, lora.b.mT), (a, kept, b.mT))
    return ModuleResidual(layer.key, rank, residual, delta_norm(lora))


def _complete(found: Iterable[ModuleResidual], lora: LoraFolder) -> Projection:
    """Modules of the LoRA alone; those that the adapter does not have are lost as a whole."""
    by_key = {module.key: module for module in found}
    return Projection(
        tuple(by_key.get(key) or ModuleResidual(key, 0, 1.0, delta_norm(part)) for key, part in lora.modules.items())
    )


def _adapt(model: nn.Module, config: LoraXSConfig, adapter_name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name)
    if adapter_name in model.peft_config:
        raise ValueError(f"adapter_name: expected a new name, got {adapter_name!r}, which the model has")
    model.add_adapter(adapter_name, config)
    return model


def _layers(model: PeftModel, adapter_name: str) -> list[LoraXSLayer]:
    layers = [module for module in model.modules() if isinstance(module, LoraXSLayer)]
    return [layer for layer in layers if adapter_name in layer.loraxs_R]


def _check_fit(lora: LoraFolder, model: PeftModel) -> None:
    """Modules that the model lacks are a mistake; those that the adapter does not target are merely lost."""
    base: Any = model.get_base_model()
    known = {name for name, _ in base.named_modules()}
    strange = [key for key in lora.modules if key not in known]
    if strange:
        raise ValueError(f"the LoRA does not fit the model, which has no module {strange[0]}")


def _load_others(model: PeftModel, lora: LoraFolder, adapter_name: str, *, assign: bool = False) -> None:
    """Load the heads."""
    if lora.others:
        load_tensors(model, lora.others, adapter_name, assign=assign)
    bare = [
        name for name, part in model.named_parameters() if part.is_meta and f"modules_to_save.{adapter_name}" in name
    ]
    if assign and bare:
        raise ValueError(f"the LoRA lacks {bare[0].replace(f'modules_to_save.{adapter_name}.', '')}")
