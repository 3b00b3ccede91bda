"""Adapters trained with the LoRA-XS and EDoRA code, as adapters of ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from loraxs_ext import basis
from loraxs_ext.basis import Factors
from loraxs_ext.basis.recipe import SklearnSigns
from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.config import BasisCheck
from loraxs_ext.peft.lora_config import from_lora
from loraxs_ext.peft.register import PREFIX as OURS
from loraxs_ext.peft.transport import root_mean_square
from loraxs_ext.peft.verify import Mismatch, measure, report
from loraxs_ext.peft.weights import load_weight

from .reference_files import PREFIX, ReferenceFiles, read_reference

# Columns of B are singular vectors where their length is 1; columns that were drawn have one of about 1/√3.
_UNIT = 1e-2


def load_reference(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    sklearn_signs: SklearnSigns = "rows of A",
    basis_check: BasisCheck = "error",
    ignore_mismatched_sizes: bool = False,
) -> PeftModel:
    """Load a checkpoint of the LoRA-XS or EDoRA code: A, B, R, magnitudes and heads; the reference's own logits.

    Stored A and B are used as they are. Where the base weights give the same ones again, `save_pretrained` then writes
    R and a sketch of the basis only; where they do not (a basis that was drawn at random, a rounded base model), A and
    B stay in the adapter's files, and a warning says so.

    Args:
        model: the base model, or a PeftModel with LoRA-XS adapters of the same base, which gets one more.
        folder: with adapter_config.json and adapter_model.safetensors; reconstr_config.json there or in its parent.
        adapter_name: the adapter's name in the model.
        is_trainable: go on training; False freezes it and puts the model in eval mode, as PeftModel.from_pretrained.
        sklearn_signs: the sign rule of the scikit-learn that trained it, needed only where A and B are not stored:
            "rows of A" up to 1.4, "columns of B" from 1.5. R alone does not tell which; the wrong one flips signs in R.
        basis_check: what to do if stored A and B do not belong to the weights of `model`: "error", "warn", "ignore".
        ignore_mismatched_sizes: let the model keep its own head where the stored one has another number of classes.

    Returns:
        The PeftModel, of the class that its task_type asks for.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError or TypeError: a file or its keys are not what is expected; the message names them.
    """
    files = read_reference(folder)
    config = from_lora(
        files.config,
        **files.reconstruction.recipe_fields,
        sklearn_signs=sklearn_signs,
        save_basis=files.has_basis,
        basis_check=basis_check,
        init_weights="zeros",
        inference_mode=not is_trainable,
    )
    adapted: PeftModel
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        adapted = model
    else:
        adapted = get_peft_model(model, config, adapter_name)
    try:
        _fill(adapted, adapter_name, files, config, ignore_mismatched_sizes)
    except BaseException:
        if adapted is model:
            adapted.delete_adapter(adapter_name)
        else:
            adapted.unload()
        raise
    return adapted if is_trainable else adapted.eval()


def _fill(model: PeftModel, adapter: str, files: ReferenceFiles, config: LoraXSConfig, resized: bool) -> None:
    """Put what was read into an adapter that was just made for it, checked against the model."""
    layers = {m.key: m for m in model.modules() if isinstance(m, LoraXSLayer) and adapter in m.r}
    _check_modules(layers, adapter, files)
    if files.has_basis:
        _check_weights(layers, adapter, files, config)
    differing = _differences(layers, adapter, files)
    tensors = _translate(files)
    _check_others(model, adapter, tensors, resized)
    set_peft_model_state_dict(model, tensors, adapter, ignore_mismatched_sizes=resized)
    for layer in layers.values():
        layer.settle(adapter)
    if not files.has_basis:
        return
    worst = max(differing, key=lambda key: differing[key])
    if differing[worst] <= config.recipe().tol:
        config.save_basis = False
        for layer in layers.values():
            layer.core(adapter).forget_basis()
    else:
        warnings.warn(
            f"LoRA-XS adapter {adapter!r}: its basis cannot be computed again from these weights (worst module "
            f"{worst}: error {differing[worst]:.3g}), so A and B stay in its files.",
            stacklevel=3,
        )


def _check_modules(layers: Mapping[str, LoraXSLayer], adapter: str, files: ReferenceFiles) -> None:
    if set(layers) != set(files.parts):
        raise ValueError(
            f"folder: expected the modules that its configuration targets in this model, got others: missing "
            f"{sorted(set(layers) - set(files.parts))}, unexpected {sorted(set(files.parts) - set(layers))}"
        )
    for key, layer in layers.items():
        r, K, N = layer.r[adapter], layer.in_features, layer.out_features
        expected = {"R": (r, r), "A": (r, K), "B": (N, r), "m": (N,)}
        for part, tensor in files.parts[key].items():
            if tensor.shape != expected[part]:
                raise ValueError(
                    f"folder: {key}: expected {part} {list(expected[part])}, as the configuration and the model have "
                    f"it, got {list(tensor.shape)}"
                )


def _check_weights(
    layers: Mapping[str, LoraXSLayer], adapter: str, files: ReferenceFiles, config: LoraXSConfig
) -> None:
    """Whether A = Bᵀ W, as in the reference, for the columns of B that are singular vectors; others do not tell."""
    found = []
    for key, layer in layers.items():
        a, b = files.parts[key]["A"].double(), files.parts[key]["B"].double()
        rows = ((b.norm(dim=0) - 1).abs() < _UNIT).nonzero().flatten()
        if len(rows):
            weight = load_weight(layer)
            made = (b[:, rows].mT.to(weight.device, torch.float32) @ weight.float()).to(a)
            size = torch.maximum(made.norm(dim=1), a[rows].norm(dim=1)).clamp_min(1e-300)
            found.append(Mismatch(key, root_mean_square((made - a[rows]).norm(dim=1) / size)))
    report(adapter, found, config.basis_check, config.basis_tol, config.recipe().tol)


def _differences(layers: Mapping[str, LoraXSLayer], adapter: str, files: ReferenceFiles) -> dict[str, float]:
    """By module, how far the stored basis is from the one that was computed from the weights."""
    if not files.has_basis:
        return {}
    return {key: measure(layer, adapter, _sketch(files.parts[key]))[1] for key, layer in layers.items()}


def _sketch(parts: Mapping[str, Tensor]) -> Tensor:
    a, bt = parts["A"].float(), parts["B"].float().mT.contiguous()
    return basis.sketch(Factors(a, bt, a.norm(dim=1) * bt.norm(dim=1), 0.0))


def _translate(files: ReferenceFiles) -> dict[str, Tensor]:
    """The tensors under the names of our own files."""
    tensors = dict(files.others)
    for key, parts in files.parts.items():
        name = f"{PREFIX}{key}.{OURS}"
        tensors[f"{name}R.weight"] = parts["R"]
        if files.has_basis:
            tensors[f"{name}R.a"], tensors[f"{name}R.bt"] = parts["A"], parts["B"].mT.contiguous()
            tensors[f"{name}R.sketch"] = _sketch(parts)
        if "m" in parts:
            tensors[f"{name}magnitude.weight"] = parts["m"]
    return tensors


def _check_others(model: PeftModel, adapter: str, tensors: Mapping[str, Tensor], resized: bool) -> None:
    """Heads and whatever else is trained: every tensor that the model saves, and no other."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    expected = {name: tensor.shape for name, tensor in saved.items() if OURS not in name}
    given = {name: tensor.shape for name, tensor in tensors.items() if OURS not in name}
    if set(given) != set(expected):
        raise ValueError(
            f"folder: expected the tensors that the configuration trains in this model, got others: missing "
            f"{sorted(set(expected) - set(given))}, unexpected {sorted(set(given) - set(expected))}"
        )
    for name in expected:
        if given[name] != expected[name] and not resized:
            raise ValueError(
                f"folder: {name}: expected shape {list(expected[name])}, as the model has it, got "
                f"{list(given[name])}; ignore_mismatched_sizes=True leaves such a tensor as it is in the model"
            )
