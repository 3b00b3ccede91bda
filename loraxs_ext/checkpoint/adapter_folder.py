"""The R matrices of an adapter folder, read without its base model."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraxs_ext.layers import group_of
from loraxs_ext.layers.tiny import draw_projections
from loraxs_ext.peft import LoraXSConfig

from .streaming import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config

PREFIX = "base_model.model."
_CORE = ".loraxs_R."
_FLOATS = {"F64", "F32", "F16", "BF16"}
# What the basis was, and v's seed: the parts of a core that are not trained.
_BESIDE_R = {"sketch", "a", "bt", "seed", "projections"}


class AdapterCore(NamedTuple):
    """What a folder says about one module.

    Attributes:
        R: [r, r] as trained; fp32 for a TinyLoRA.
        sketch: fp32 [5, r] of the basis that R belongs to.
        scaling: s, alpha / r or alpha / √r with the configured r.
    """

    R: Tensor
    sketch: Tensor
    scaling: float


class AdapterFolder(NamedTuple):
    """An adapter of nothing but R.

    Attributes:
        config: of the adapter.
        cores: by module key, sorted.
    """

    config: LoraXSConfig
    cores: dict[str, AdapterCore]


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Read a LoRA-XS or TinyLoRA adapter.

    Raises:
        OSError: a file cannot be read.
        ValueError or TypeError: the folder is damaged, holds another kind of adapter, or something beside R that a row
            of R's cannot say (magnitudes, heads, biases, tokens, stacks of experts); says which.
    """
    config = _config(json.dumps(read_adapter_config(folder), sort_keys=True))
    _refuse_more_than_r(folder, config)
    tensors = _read(folder / ADAPTER_WEIGHTS)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, part = name.removeprefix(PREFIX).partition(_CORE)
        modules.setdefault(key, {})[part] = tensor
    matrices = _tiny_matrices(folder, config, modules) if config.use_tinylora else _matrices(folder, modules)
    cores = {}
    for key in sorted(modules):
        sketch, R = modules[key].get("sketch"), matrices[key]
        r = _pattern(config.rank_pattern, key, config.r)
        if R.ndim != 2 or R.shape[0] != R.shape[1] or not 1 <= R.shape[0] <= r:
            raise ValueError(f"{folder}: {key}: expected R [r, r] with r from 1 to {r}, got {list(R.shape)}")
        if sketch is None or sketch.shape != (5, len(R)) or not sketch.isfinite().all():
            got = "none" if sketch is None else f"{list(sketch.shape)}, or one that is not finite"
            raise ValueError(f"{folder}: {key}: expected a sketch [5, {len(R)}] of the basis, got {got}")
        if not R.isfinite().all():
            raise ValueError(f"{folder}: {key}: expected finite numbers in R, got NaN or infinity")
        alpha = _pattern(config.alpha_pattern, key, config.lora_alpha)
        cores[key] = AdapterCore(R, sketch.float(), alpha / (math.sqrt(r) if config.use_rslora else r))
    return AdapterFolder(config, cores)


@functools.lru_cache(maxsize=64)
def _config(text: str) -> LoraXSConfig:
    """The configuration with these fields; of a million adapters, most have the same."""
    values: dict[str, Any] = json.loads(text)
    if values.get("peft_type") != "LORAXS":
        raise ValueError(f"{ADAPTER_CONFIG}: peft_type: expected 'LORAXS', got {values.get('peft_type')!r}")
    return config_of(values)


def config_of(values: Mapping[str, Any]) -> LoraXSConfig:
    """The configuration with the fields of an adapter_config.json; those of other releases of PEFT are left out."""
    known = {field.name for field in fields(LoraXSConfig) if field.init} - {"peft_type"}
    return LoraXSConfig(**{name: value for name, value in values.items() if name in known})


def _refuse_more_than_r(folder: Path, config: LoraXSConfig) -> None:
    for what, present in {
        "magnitudes (use_edora)": config.use_edora,
        f"biases (bias={config.bias!r})": config.bias != "none",
        f"whole modules (modules_to_save={config.modules_to_save})": bool(config.modules_to_save),
        "single tokens (trainable_token_indices)": bool(config.trainable_token_indices),
        "stacks of experts (target_parameters)": bool(config.target_parameters),
    }.items():
        if present:
            raise ValueError(f"{folder}: expected an adapter of nothing but R, got one that also trains {what}")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of cores, except for bases that are kept with them."""
    try:
        # The library compares the header with the size of the file before it allocates.
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                key, found, part = name.removeprefix(PREFIX).partition(_CORE)
                if not name.startswith(PREFIX) or not found or part not in _BESIDE_R | {"weight", "v"}:
                    raise ValueError(f"{path}: expected tensors of R only, named {PREFIX}…{_CORE}…, got {name}")
                kind = file.get_slice(name).get_dtype()
                if kind not in ({"I64"} if part == "seed" else _FLOATS):
                    raise ValueError(f"{path}: {name}: expected numbers of a known dtype, got {kind}")
            if not names:
                raise ValueError(f"{path}: expected an R for every module, got none")
            return {name: file.get_tensor(name) for name in names if not name.endswith((f"{_CORE}a", f"{_CORE}bt"))}
    except SafetensorError as reason:
        raise ValueError(f"{path}: expected a whole safetensors file, got: {reason}") from None


def _matrices(folder: Path, modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    for key, parts in modules.items():
        if "weight" not in parts:
            raise ValueError(f"{folder}: {key}: expected an R, got only {sorted(parts)}")
    return {key: parts["weight"] for key, parts in modules.items()}


def _tiny_matrices(
    folder: Path, config: LoraXSConfig, modules: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """R = Σ_k v_k P_k, by the arithmetic of `TinyCore`: the same bits."""
    for key, parts in modules.items():
        if "sketch" not in parts or "seed" not in parts or parts["seed"].numel() != 1 or parts["sketch"].ndim != 2:
            raise ValueError(f"{folder}: {key}: expected a sketch and a seed of TinyLoRA, got {sorted(parts)}")
    order = sorted(modules, key=lambda key: int(modules[key]["seed"]))
    vectors: dict[int, Tensor] = {}
    matrices = {}
    for index, key in enumerate(order):
        parts, group = modules[key], group_of(index, len(order), config.weight_tying)
        # The first module of a group has the v of all.
        v = vectors.setdefault(group, parts.get("v", torch.empty(0)))
        r, seed = parts["sketch"].shape[1], int(parts["seed"])
        if v.shape != (config.u,) or not 1 <= r <= _pattern(config.rank_pattern, key, config.r) or seed < 0:
            got = f"v {list(v.shape)}, rank {r}, seed {seed}"
            raise ValueError(f"{folder}: {key}: expected v [{config.u}], the rank of the configuration, got {got}")
        p = parts["projections"] if "projections" in parts else draw_projections(config.u, r, seed)
        if p.shape != (config.u, r, r):
            raise ValueError(f"{folder}: {key}: expected P [{config.u}, {r}, {r}], got {list(p.shape)}")
        p = p.to(v.dtype)
        matrices[key] = (v @ p.flatten(1)).view(r, r)
    return matrices


def _pattern(pattern: Mapping[str, Any], key: str, default: Any) -> Any:
    """As the tuner looks a module up."""
    return pattern.get(get_pattern_key(list(pattern), key), default)
