"""TinyLoRA adapters in PEFT's own files, both ways: what PEFT saved gives the same logits here, and the other way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loraxs_ext.files import atomic_file, read_json, write_json
from loraxs_ext.files.safetensors import FLOATS
from loraxs_ext.layers import LoraXSLayer, TinyCore, group_of
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.config import RECIPE_FIELDS

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields that mean the same in both configurations, with the types of what JSON may hold.
_OPTIONAL_NAMES = (list, str, type(None))
_SAME_FIELDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "u": (int,),
    "weight_tying": (float, int),
    "projection_seed": (int,),
    "init_v_bound": (float, int),
    "target_modules": (list, str),
    "modules_to_save": _OPTIONAL_NAMES,
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": _OPTIONAL_NAMES,
    "task_type": (str, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
}
_BIASES = {"none": "none", "all": "all", "tinylora_only": "loraxs_only"}


class _Site(NamedTuple):
    """One adapted layer: its name in the model, its core, and the number of the v it uses."""

    name: str
    layer: LoraXSLayer
    core: TinyCore
    group: int


def load_tinylora(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Load an adapter that PEFT's TinyLoRA saved; it gives the logits it gave there.

    A and B are those of the file, kept with the adapter, and no SVD is computed. P is kept with it only where the
    file's differs from what `projection_seed` gives.

    Args:
        model: the base model; or a PeftModel with LoRA-XS adapters, which the adapter joins, on their basis.
        folder: with adapter_config.json and adapter_model.safetensors; trained heads and biases are loaded too.
        adapter_name: name of the adapter here.
        is_trainable: leave the adapter trainable and the model as it is; else freeze it and put the model in eval mode.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, is none of TinyLoRA's, or does not fit the model, out of which it is then taken.
        TypeError: the adapter is for modules that cannot be adapted.
    """
    folder = Path(folder)
    config = _translate(_read_config(folder / CONFIG_NAME), inference_mode=not is_trainable)
    joined = model if isinstance(model, PeftModel) else None
    if joined is not None:
        if adapter_name in joined.peft_config:
            raise ValueError(f"adapter_name: expected a new name, got {adapter_name!r}, which exists")
        for name in RECIPE_FIELDS:
            setattr(config, name, getattr(next(iter(joined.peft_config.values())), name, getattr(config, name)))
    elif any(isinstance(module, LoraXSLayer) for module in model.modules()):
        raise ValueError("model: expected a base model or a PeftModel, got a base model that was already adapted")
    with _open(folder / WEIGHTS_NAME) as file:
        stored = _Stored(folder / WEIGHTS_NAME, file)
        # What the configuration claims is allocated only as far as the file has it.
        config.r = stored.largest_rank(config.r, config.u)
        config.lora_alpha = config.r
        try:
            # Nothing but the file knows the basis: cores on the meta device keep the injection from computing one.
            if joined is not None:
                joined.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
                peft_model = joined
            else:
                peft_model = cast(PeftModel, get_peft_model(model, config, adapter_name, low_cpu_mem_usage=True))
            _fill(peft_model, adapter_name, stored)
        except BaseException:
            _take_out(model, adapter_name)
            raise
    if not is_trainable:
        peft_model.eval()
    return peft_model


@torch.no_grad()
def save_tinylora(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Write a TinyLoRA adapter of `model` as PEFT does, so that PEFT's own `from_pretrained` gives the same logits.

    A, B and P are in the file, hence it has the size of a LoRA's. The scaling becomes part of P, and smaller ranks are
    padded with zeros, because PEFT's TinyLoRA knows neither. Each file appears complete or not at all.

    Args:
        model: with the adapter.
        folder: where to; created if need be, an adapter in it is replaced.
        adapter_name: name of the adapter.

    Raises:
        ValueError: there is no such adapter, it is none with `use_tinylora`, or it has trained single tokens, which
            PEFT's TinyLoRA cannot hold.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, LoraXSConfig) or not config.use_tinylora:
        raise ValueError(f"adapter_name: expected an adapter with use_tinylora=True, got {adapter_name!r}: {config!r}")
    if config.trainable_token_indices is not None:
        raise ValueError(f"trainable_token_indices: expected None, got {config.trainable_token_indices!r}")
    sites = _sites(model, adapter_name)
    rank = max(site.core.rank for site in sites)
    tensors = {}
    for site in sites:
        site.layer.settle(adapter_name)
        a, b = site.layer.get_basis(adapter_name)
        p = site.core.placed * site.layer.scaling[adapter_name]
        missing = min(rank, site.layer.in_features, site.layer.out_features) - site.core.rank
        name = _PREFIX + site.layer.key
        tensors[f"{name}.tinylora_A"] = F.pad(a, (0, 0, 0, missing))
        tensors[f"{name}.tinylora_B"] = F.pad(b, (0, missing))
        tensors[f"{name}.tinylora_P"] = F.pad(p, (0, missing, 0, missing))
        tensors[f"base_model.tinylora_v.{site.group}"] = site.core.vector
    for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if ".loraxs_R." not in name:
            tensors[name] = tensor
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / WEIGHTS_NAME) as temporary:
        # safetensors wants every tensor contiguous, and none to share memory with another.
        copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(copies, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, dict(sorted(_to_json(config, rank, sites).items())))


class _Stored:
    """The tensors of an open safetensors file, read one by one after their shapes were checked."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file
        self.names = set(file.keys())

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of floating-point numbers of this shape, all of them finite."""
        self._check(name, shape)
        tensor = self._file.get_tensor(name)
        if not tensor.isfinite().all():
            raise ValueError(f"{self.path}: {name}: expected finite numbers, got NaN or Inf")
        return tensor

    def largest_rank(self, r: int, u: int) -> int:
        """The rank of the largest A, after every A and v was found to have the size that r and u give it."""
        ranks = []
        for name in sorted(self.names):
            if ".tinylora_v." in name:
                self._check(name, (u,))
            elif name.endswith(".tinylora_A"):
                K, N = math.prod(self._shape(name)[1:]), math.prod(self._shape(name[:-1] + "B")[:1])
                ranks.append(min(r, N, K))
                self._check(name, (ranks[-1], K))
        if not ranks:
            raise ValueError(f"{self.path}: expected tensors of TinyLoRA, got none")
        return max(ranks)

    def _shape(self, name: str) -> list[int]:
        if name not in self.names:
            raise ValueError(f"{self.path}: expected a tensor {name}, got none")
        return self._file.get_slice(name).get_shape()

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._shape(name)
        entry = self._file.get_slice(name)
        if tuple(found) != shape or entry.get_dtype() not in FLOATS:
            raise ValueError(
                f"{self.path}: {name}: expected floating-point numbers of shape {list(shape)}, got {entry.get_dtype()} "
                f"of shape {found}"
            )

    def rest(self) -> dict[str, Tensor]:
        """What belongs to the model rather than to TinyLoRA: heads and biases."""
        return {name: self._file.get_tensor(name) for name in self.names if ".tinylora_" not in name}


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, got none")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as reason:
        raise ValueError(f"{path}: expected a whole safetensors file, got one that is not: {reason}") from None


def _read_config(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    if fields.get("peft_type") != "TINYLORA":
        raise ValueError(f"{path}: peft_type: expected 'TINYLORA', got {fields.get('peft_type')!r}")
    for name, kinds in _SAME_FIELDS.items():
        value = fields.get(name)
        if name in fields and (not isinstance(value, kinds) or isinstance(value, bool)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {name}: expected {expected}, got {value!r}")
    return fields


def _translate(fields: Mapping[str, Any], inference_mode: bool) -> LoraXSConfig:
    """Our configuration of the same adapter."""
    same: dict[str, Any] = {name: fields[name] for name in _SAME_FIELDS if name in fields}
    same = {"r": 2, **same}
    bias, dropout = fields.get("bias", "none"), fields.get("tinylora_dropout", 0.0)
    if not isinstance(bias, str) or bias not in _BIASES:
        raise ValueError(f"bias: expected one of {list(_BIASES)}, got {bias!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise ValueError(f"tinylora_dropout: expected a number, got {dropout!r}")
    return LoraXSConfig(
        **same,
        use_tinylora=True,
        lora_alpha=same["r"],
        loraxs_dropout=float(dropout),
        bias=cast(Any, _BIASES[bias]),
        init_weights="zeros",
        sigma="sqrt",
        svd="exact",
        save_basis=True,
        save_projection=True,
        inference_mode=inference_mode,
    )


def _to_json(config: LoraXSConfig, rank: int, sites: list[_Site]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(config, name) for name in _SAME_FIELDS}
    if config.exclude_modules:
        # Which PEFT's TinyLoRA does not know, so name what is left.
        targets = [site.layer.key for site in sites]
        fields |= {"target_modules": targets, "layers_to_transform": None, "layers_pattern": None}
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    return {
        **fields,
        "peft_type": "TINYLORA",
        "task_type": getattr(config.task_type, "value", config.task_type),
        "auto_mapping": config.auto_mapping,
        "inference_mode": True,
        "r": rank,
        "bias": next(theirs for theirs, ours in _BIASES.items() if ours == config.bias),
        "tinylora_dropout": config.loraxs_dropout,
        "save_projection": True,
        "init_weights": True,
        "fan_in_fan_out": all(site.layer.fan_in_fan_out for site in sites),
    }


def _sites(model: PeftModel, adapter: str) -> list[_Site]:
    """The layers of the adapter in the order of the model, which is what PEFT numbers them by."""
    config = cast(LoraXSConfig, model.peft_config[adapter])
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraXSLayer) and adapter in m.loraxs_R]
    tying = config.weight_tying
    return [
        _Site(name, layer, cast(TinyCore, layer.core(adapter)), group_of(index, len(found), tying))
        for index, (name, layer) in enumerate(found)
    ]


def _fill(model: PeftModel, adapter: str, stored: _Stored) -> None:
    """Give the adapter the file's tensors, under the names of our checkpoints."""
    sites, tensors, known = _sites(model, adapter), stored.rest(), set()

    def read(name: str, *shape: int) -> Tensor:
        known.add(name)
        return stored.read(name, shape)

    has_projections = any(name.endswith(".tinylora_P") for name in stored.names)
    projections = {}
    for site in sites:
        theirs, ours = _PREFIX + site.layer.key, f"{site.name}.loraxs_R"
        rank, u = site.core.rank, site.core.u
        v = read(f"base_model.tinylora_v.{site.group}", u)
        if site.core.v is not None:
            tensors[f"{ours}.v"] = v.to(site.core.v.dtype)
        tensors[f"{ours}.a"] = read(f"{theirs}.tinylora_A", rank, site.layer.in_features)
        tensors[f"{ours}.bt"] = read(f"{theirs}.tinylora_B", site.layer.out_features, rank).mT.contiguous()
        tensors[f"{ours}.seed"] = site.core.seed
        # Where P is drawn again, PEFT rounds it to the dtype of the base.
        p = read(f"{theirs}.tinylora_P", u, rank, rank) if has_projections else site.core.on_basis
        projections[f"{ours}.projections"] = p.to(torch.float32 if has_projections else site.layer.basis_dtype).float()
    unknown = sorted(name for name in stored.names - known if ".tinylora_" in name)
    if unknown:
        raise ValueError(f"{stored.path}: expected tensors of {len(sites)} modules of the model, got {unknown[0]} too")
    if all(torch.equal(p, site.core.on_basis) for p, site in zip(projections.values(), sites, strict=True)):
        # As the seed gives them, so the seed is enough.
        cast(LoraXSConfig, model.peft_config[adapter]).save_projection = False
        for site in sites:
            site.core.projections = None
    else:
        tensors |= projections
    try:
        set_peft_model_state_dict(model, tensors, adapter, low_cpu_mem_usage=True)
    except (KeyError, RuntimeError) as reason:
        raise ValueError(f"{stored.path}: expected the heads and biases of the model, got: {reason}") from reason
    sites[0].layer.settle(adapter)


def _take_out(model: nn.Module, adapter: str) -> None:
    """Remove what a refused file has put into the model."""
    if isinstance(model, PeftModel):
        if adapter in model.peft_config:
            model.delete_adapter(adapter)
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraXSLayer):
                setattr(parent, name, child.base_layer)
            elif isinstance(child, ModulesToSaveWrapper):
                setattr(parent, name, child.original_module)
    model.__dict__.pop("peft_config", None)
