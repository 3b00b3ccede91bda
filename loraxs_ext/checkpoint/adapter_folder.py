"""The R matrices of an adapter folder, read without its base model.

Of many folders alike, each after the first takes a fraction of a millisecond: what a header says is worked out once.
"""

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
from torch import Tensor

from loraxs_ext.files.safetensors import FLOATS, Place, parse_header, read_header
from loraxs_ext.layers import group_of
from loraxs_ext.layers.tiny import draw_projections
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.patterns import check_patterns
from loraxs_ext.store import RowLayout, Segment

from .streaming import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config

PREFIX = "base_model.model."
SKETCH_ROWS = 5
_CORE = ".loraxs_R."
_PARTS = {"weight", "v", "sketch", "a", "bt", "seed", "projections"}
# Of the P of a TinyLoRA module, which a few bytes of a file can ask for: 256 MB.
_MAX_DRAWN = 1 << 26
# JSON has whole numbers that no float holds.
_MAX_ALPHA = 1e30


class AdapterFolder(NamedTuple):
    """An adapter of nothing but R.

    Attributes:
        config: of the adapter.
        layout: its modules by name, with the scaling alpha / r or alpha / √r of the configured r.
        numbers: [layout.size], R of all modules as trained; of a TinyLoRA, the R that v stands for.
        sketches: fp32, the sketches [5, r] of the bases that they belong to, end to end.
    """

    config: LoraXSConfig
    layout: RowLayout
    numbers: Tensor
    sketches: Tensor


class _Plan(NamedTuple):
    """How the files with one header are read.

    Attributes:
        modules: parts by module key.
        layout: of the row.
        matrices, sketches: dtype, and the position of every number in the data as an array of that dtype; None where
            they are of several dtypes, not aligned, or no tensors of the file.
    """

    modules: dict[str, dict[str, Place]]
    layout: RowLayout
    matrices: tuple[torch.dtype, Tensor] | None
    sketches: tuple[torch.dtype, Tensor] | None


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Read a LoRA-XS or TinyLoRA adapter.

    Raises:
        OSError: a file cannot be read.
        ValueError or TypeError: the folder is damaged, holds another kind of adapter, or something beside R that a row
            of R's cannot say (magnitudes, heads, biases, tokens, stacks of experts); says which.
    """
    text = json.dumps(read_adapter_config(folder), sort_keys=True)
    try:
        config = _config(text)
        with (folder / ADAPTER_WEIGHTS).open("rb") as file:
            header, size = read_header(file)
            plan = _plan(header, size, text)
            data = bytearray(size)
            if file.readinto(data) != size:
                raise ValueError(f"expected a whole safetensors file, got one cut off within {size} bytes")
        numbers = _tiny_matrices(config, plan, data) if config.use_tinylora else _gather(plan, data, "weight")
        sketches = _gather(plan, data, "sketch").float()
        _check_finite(plan.layout, "R", numbers, [r * r for _, r, _ in plan.layout.segments])
        _check_finite(plan.layout, "the sketch", sketches, [SKETCH_ROWS * r for _, r, _ in plan.layout.segments])
    except (ValueError, TypeError) as reason:
        raise type(reason)(f"{folder}: {reason}") from None
    return AdapterFolder(config, plan.layout, numbers, sketches)


def config_of(values: Mapping[str, Any]) -> LoraXSConfig:
    """The configuration with the fields of an adapter_config.json; those of other releases of PEFT are left out."""
    known = {field.name for field in fields(LoraXSConfig) if field.init} - {"peft_type"}
    return LoraXSConfig(**{name: value for name, value in values.items() if name in known})


# Of a million adapters, most have the same configuration, and the same header.
@functools.lru_cache(maxsize=64)
def _config(text: str) -> LoraXSConfig:
    values: dict[str, Any] = json.loads(text)
    if values.get("peft_type") != "LORAXS":
        raise ValueError(f"{ADAPTER_CONFIG}: peft_type: expected 'LORAXS', got {values.get('peft_type')!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        _check_pattern(field, values.get(field) or {})
    _check_number("lora_alpha", values.get("lora_alpha", 1))
    config = config_of(values)
    for what, present in {
        "magnitudes (use_edora)": config.use_edora,
        f"biases (bias={config.bias!r})": config.bias != "none",
        f"whole modules (modules_to_save={config.modules_to_save})": bool(config.modules_to_save),
        "single tokens (trainable_token_indices)": bool(config.trainable_token_indices),
        "stacks of experts (target_parameters)": bool(config.target_parameters),
    }.items():
        if present:
            raise ValueError(f"expected an adapter of nothing but R, got one that also trains {what}")
    return config


def _check_pattern(field: str, pattern: object) -> None:
    """Refuse what is no mapping from names to numbers."""
    if not isinstance(pattern, dict):
        raise ValueError(f"{ADAPTER_CONFIG}: {field}: expected an object of numbers by name, got {pattern!r:.100}")
    for name, value in pattern.items():
        _check_number(f"{field}: {name}", value)


def _check_number(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_ALPHA:
        raise ValueError(f"{ADAPTER_CONFIG}: {field}: expected a finite number, got {value!r:.100}")


@functools.lru_cache(maxsize=8)
def _plan(header: bytes, size: int, text: str) -> _Plan:
    """How to read the files with this header, `size` bytes of data behind it and this configuration."""
    config, modules = _config(text), _modules(header, size)
    check_patterns({"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}, modules)
    segments = []
    for key in sorted(modules):
        most = _pattern(config.rank_pattern, key, config.r)
        alpha = _pattern(config.alpha_pattern, key, config.lora_alpha)
        scaling = alpha / (math.sqrt(most) if config.use_rslora else most)
        segments.append(Segment(key, _rank(key, modules[key], most, config.use_tinylora), scaling))
    layout = RowLayout(segments)
    ordered = [modules[key] for key, _, _ in segments]
    matrices = None if config.use_tinylora else _positions([parts["weight"] for parts in ordered])
    return _Plan(modules, layout, matrices, _positions([parts["sketch"] for parts in ordered]))


def _rank(key: str, parts: Mapping[str, Place], most: int, tiny: bool) -> int:
    """r of a module, at most the configured one: of R, or of a TinyLoRA's sketch."""
    sketch = parts["sketch"].shape if "sketch" in parts else ()
    if tiny:
        r = sketch[-1] if sketch else 0
    else:
        shape = parts["weight"].shape if "weight" in parts else ()
        r = shape[0] if shape else 0
        if shape != (r, r) or not 1 <= r <= most:
            raise ValueError(f"{key}: expected R [r, r] with r from 1 to {most}, got {list(shape)}")
    if sketch != (SKETCH_ROWS, r) or not 1 <= r <= most:
        raise ValueError(f"{key}: expected a sketch [{SKETCH_ROWS}, {r or most}] of the basis, got {list(sketch)}")
    return r


def _modules(header: bytes, size: int) -> dict[str, dict[str, Place]]:
    """The tensors of cores, by module and part; they account for every byte of the data."""
    modules: dict[str, dict[str, Place]] = {}
    for name, place in parse_header(header, size).places.items():
        key, found, part = name.removeprefix(PREFIX).partition(_CORE)
        if not name.startswith(PREFIX) or not found or part not in _PARTS:
            raise ValueError(f"expected tensors of R only, named {PREFIX}…{_CORE}…, got {name}")
        if place.dtype not in ((torch.int64,) if part == "seed" else FLOATS.values()):
            raise ValueError(f"{name}: expected numbers of a known dtype, got {place.dtype}")
        modules.setdefault(key, {})[part] = place
    if not modules:
        raise ValueError("expected an R for every module, got none")
    return modules


def _positions(parts: list[Place]) -> tuple[torch.dtype, Tensor] | None:
    dtype = parts[0].dtype
    if any(part.dtype != dtype or part.begin % dtype.itemsize for part in parts):
        return None
    begins = [part.begin // dtype.itemsize for part in parts]
    return dtype, torch.cat([torch.arange(b, b + math.prod(p.shape)) for b, p in zip(begins, parts, strict=True)])


def _gather(plan: _Plan, data: bytearray, part: str) -> Tensor:
    """This part of all modules, in the order of the layout, end to end."""
    positions = plan.matrices if part == "weight" else plan.sketches
    if positions is None:
        return torch.cat([plan.modules[key][part].read(data).flatten() for key, _, _ in plan.layout.segments])
    dtype, index = positions
    return torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)[index]


def _check_finite(layout: RowLayout, what: str, flat: Tensor, sizes: list[int]) -> None:
    if flat.isfinite().all():
        return
    parts = zip(layout.index, flat.split(sizes), strict=True)
    key = next(key for key, part in parts if not part.isfinite().all())
    raise ValueError(f"{key}: expected finite numbers in {what}, got NaN or infinity")


def _tiny_matrices(config: LoraXSConfig, plan: _Plan, data: bytearray) -> Tensor:
    """R = Σ_k v_k P_k, by the arithmetic of `TinyCore`: the same bits."""
    ranks = {key: r for key, r, _ in plan.layout.segments}
    seeds: dict[str, int] = {}
    for key, parts in plan.modules.items():
        if "seed" not in parts or parts["seed"].shape != ():
            raise ValueError(f"{key}: expected a sketch and a seed of TinyLoRA, got {sorted(parts)}")
        seeds[key] = int(parts["seed"].read(data))
        if seeds[key] < 0:
            raise ValueError(f"{key}: seed: expected at least 0, got {seeds[key]}")
    vectors: dict[int, Tensor] = {}
    matrices = {}
    for index, key in enumerate(sorted(seeds, key=lambda key: seeds[key])):
        parts, r = plan.modules[key], ranks[key]
        group = group_of(index, len(seeds), config.weight_tying)
        # The first module of a group has the v of all.
        v = vectors.setdefault(group, parts["v"].read(data) if "v" in parts else torch.empty(0))
        if v.shape != (config.u,):
            raise ValueError(f"{key}: expected v [{config.u}], got {list(v.shape)}")
        if config.u * r * r > _MAX_DRAWN:
            raise ValueError(f"{key}: expected P of at most {_MAX_DRAWN} numbers, got [{config.u}, {r}, {r}]")
        if "projections" in parts:
            p = parts["projections"].read(data)
        else:
            p = draw_projections(config.u, r, seeds[key])
        if p.shape != (config.u, r, r):
            raise ValueError(f"{key}: expected P [{config.u}, {r}, {r}], got {list(p.shape)}")
        matrices[key] = (v @ p.to(v.dtype).flatten(1)).flatten()
    return torch.cat([matrices[key] for key in ranks])


def _pattern(pattern: Mapping[str, Any], key: str, default: Any) -> Any:
    """As the tuner looks a module up."""
    return pattern.get(get_pattern_key(list(pattern), key), default)
