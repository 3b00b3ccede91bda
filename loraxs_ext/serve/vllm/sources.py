"""R-only adapters by name, out of a store or a folder of PEFT adapters, each with what tells its basis."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraxs_ext.basis import Recipe
from loraxs_ext.checkpoint.streaming import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.patterns import check_patterns
from loraxs_ext.store import AdapterRow, AdapterStore, RowLayout, Segment

_PREFIX, _CORE = "base_model.model.", ".loraxs_R."
# Adapters of a folder that are kept in memory.
_REMEMBERED = 256
# R, the sketch of its basis, and that basis itself, which the sketch stands for.
_WEIGHT, _SKETCH, _BASIS = "weight", "sketch", ("a", "bt")


class Found(NamedTuple):
    """An adapter and what tells its basis.

    Attributes:
        row: its R matrices.
        recipe: how its basis is computed.
        sketches: by module key, fp32 [5, at least r], `loraxs_ext.basis.sketch` of that basis.
    """

    row: AdapterRow
    recipe: Recipe
    sketches: Mapping[str, Tensor]


class Adapters(Protocol):
    """Adapters by name. Called from several threads."""

    def find(self, name: str) -> Found | None:
        """The adapter as it is now; None if there is none."""
        ...


def open_adapters(path: Path) -> Adapters:
    """The adapters in `path`: a store, or a folder that holds a folder of each adapter.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: it is a store, and lmdb is missing.
        ValueError: it is a store that cannot be read.
    """
    if (path / "data.mdb").is_file():
        return StoredAdapters(AdapterStore(path, readonly=True))
    if not path.is_dir():
        raise FileNotFoundError(f"expected an adapter store or a folder of adapters, got {path}, which does not exist")
    return AdapterFolders(path)


class StoredAdapters:
    """The adapters of a store."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._recipe = Recipe.from_dict(store.manifest.recipe)

    def find(self, name: str) -> Found | None:
        """The adapter as it is now; None if there is none.

        Raises:
            ValueError: its record is damaged, or no adapter can have such a name.
        """
        try:
            return Found(self._store.row(name), self._recipe, self._store.manifest.sketches)
        except KeyError:
            return None


class AdapterFolders:
    """A folder of adapters as `save_pretrained` writes them; the name of an adapter is that of its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Reading one takes 20 ms, and whether its files have changed some microseconds.
        self._read = lru_cache(_REMEMBERED)(lambda name, path, stamps: read_adapter(name, path))

    def find(self, name: str) -> Found | None:
        """The adapter as it is now; None if there is none.

        Raises:
            ValueError: the folder is not that of a LoRA-XS adapter of linear layers alone.
        """
        # A name comes from a request: it is looked up among those that exist, and never made a path.
        with os.scandir(self._folder) as entries:
            found = next((Path(entry.path) for entry in entries if entry.name == name and entry.is_dir()), None)
        if found is None:
            return None
        files = [path.stat() for path in (found / ADAPTER_CONFIG, found / ADAPTER_WEIGHTS) if path.exists()]
        return self._read(name, found, tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files))


def read_adapter(name: str, folder: Path) -> Found:
    """The adapter in a folder that `save_pretrained` wrote.

    Raises:
        ValueError: it is another kind of adapter, has more than R matrices, or is damaged.
    """
    kind = read_adapter_config(folder).get("peft_type")
    if kind != "LORAXS":
        raise ValueError(f"adapter {name!r}: expected a LoRA-XS adapter, got one of type {kind!r}")
    try:
        config = LoraXSConfig.from_pretrained(str(folder))
    except (TypeError, AttributeError, KeyError) as reason:
        raise ValueError(f"adapter {name!r}: {ADAPTER_CONFIG} cannot be understood: {reason}") from None
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if not key.endswith(_BASIS)}  # noqa: SIM118
    except SafetensorError as reason:
        raise ValueError(f"adapter {name!r}: {ADAPTER_WEIGHTS} is damaged: {reason}") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in tensors.items():
        key, core, part = stored.removeprefix(_PREFIX).partition(_CORE)
        if not core or part not in (_WEIGHT, _SKETCH):
            raise ValueError(f"adapter {name!r}: expected R matrices of linear layers alone, got {stored} beside them")
        parts.setdefault(key, {})[part] = tensor
    if parts:
        check_patterns({"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}, parts)
    segments, numbers, sketches = [], [], {}
    for key, both in sorted(parts.items()):
        shapes = {part: tuple(tensor.shape) for part, tensor in both.items()}
        r = shapes.get(_WEIGHT, (0,))[-1]
        if shapes != {_WEIGHT: (r, r), _SKETCH: (5, r)}:
            raise ValueError(f"adapter {name!r}: {key}: expected R [r, r] and its sketch [5, r], got {shapes}")
        segments.append(Segment(key, r, _scaling(config, key)))
        numbers.append(both[_WEIGHT].float().flatten())
        sketches[key] = both[_SKETCH].float()
    row = AdapterRow(name, 0, RowLayout(segments), torch.cat(numbers) if numbers else torch.empty(0))
    return Found(row, config.recipe(), sketches)


def _scaling(config: LoraXSConfig, key: str) -> float:
    """s of a module: alpha / r of the configured rank, which a small layer's R does not reach."""
    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), key), config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)
