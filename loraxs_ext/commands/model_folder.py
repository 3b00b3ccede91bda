"""The linear weights of a transformers model folder, one at a time and one shard at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft import LoraXSConfig

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Target:
    """A weight to be decomposed.

    Attributes:
        key: name of the module, as the tuner calls it.
        shape: (N, K).
        rank: of its basis.
        shard: file it lies in.
        tensor: its name there.
        transposed: whether the file holds [K, N].
    """

    key: str
    shape: tuple[int, int]
    rank: int
    shard: Path
    tensor: str
    transposed: bool


def find_targets(folder: Path, config: LoraXSConfig) -> list[Target]:
    """What `get_peft_model(model, config)` would adapt in the model of this folder, in the order of the shards.

    No weight is read: the model is built on the meta device.

    Args:
        folder: with config.json and safetensors, as `save_pretrained` writes it.
        config: targets, ranks and exclusions.

    Raises:
        ValueError: the folder is not that of a model this can be done for; says what is missing.
    """
    model = _empty_model(folder)
    where = _tensors_of(folder)
    tied = {k: v for k, v in (getattr(model, "all_tied_weights_keys", None) or {}).items() if isinstance(v, str)}
    prefix = getattr(model, "base_model_prefix", "")
    with warnings.catch_warnings():
        # PEFT asks models for attributes that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    targets, missing = [], []
    for layer in (module for module in adapted.modules() if isinstance(module, LoraXSLayer)):
        name = f"{layer.key}.weight"
        names = [name, *([tied[name]] if name in tied else [])]
        found = next((n for wanted in names for n in _spellings(wanted, prefix) if n in where), None)
        if found is None:
            missing.append(name)
            continue
        rank = next(iter(layer.r.values()))
        shape = (layer.out_features, layer.in_features)
        targets.append(Target(layer.key, shape, rank, where[found], found, layer.fan_in_fan_out))
    if missing:
        raise ValueError(
            f"the checkpoint in {folder} lacks {len(missing)} of {len(missing) + len(targets)} targeted weights, such "
            f"as {missing[0]!r}; if transformers converts them when it loads the model, save the loaded model once"
        )
    return sorted(targets, key=lambda target: (target.shard, target.tensor))


@dataclass
class WeightStream:
    """Reads targets; the file of a shard stays open until another one is asked for.

    Args:
        dtype: the weights are rounded to, as the model will have them; None to leave them as stored.

    Attributes:
        energies: ‖W‖² by module key, of what has been read.
    """

    dtype: torch.dtype | None
    energies: dict[str, float] = field(default_factory=dict)
    _shard: Path | None = None
    _file: safe_open | None = None

    def read(self, target: Target) -> Tensor:
        """The weight [N, K], on the CPU.

        Raises:
            ValueError: the file holds another shape than the model has.
        """
        if self._shard != target.shard:
            self.close()
            self._shard, self._file = target.shard, safe_open(target.shard, framework="pt").__enter__()
        assert self._file is not None
        weight = self._file.get_tensor(target.tensor)
        if self.dtype is not None:
            weight = weight.to(self.dtype)
        weight = weight.mT if target.transposed else weight
        if tuple(weight.shape) != target.shape:
            raise ValueError(f"{target.tensor} in {target.shard} must have shape {target.shape}, got {weight.shape}")
        self.energies[target.key] = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
        return weight

    def close(self) -> None:
        """Let go of the open shard."""
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._shard = self._file = None


def _empty_model(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL must be a folder of a transformers model, got {folder} without config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the weights in {folder} are stored quantised; prepare the bases from the original weights and give the "
            f"file to LoraXSConfig(basis_file=…)"
        )
    names = [name for name in getattr(config, "architectures", None) or [] if hasattr(transformers, name)]
    with torch.device("meta"):
        if names:
            return getattr(transformers, names[0])(config)
        return transformers.AutoModel.from_config(config)


def _tensors_of(folder: Path) -> Mapping[str, Path]:
    """Tensor name -> file."""
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8")).get("weight_map", {})
        if any(Path(file).name != file for file in index.values()):
            raise ValueError(f"{folder / _INDEX} names files outside of its folder")
        return {name: folder / file for name, file in index.items()}
    if not (folder / _SINGLE).is_file():
        raise ValueError(f"{folder} must hold {_SINGLE} or {_INDEX}; pickled weights are not read, save them again")
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)


def _spellings(name: str, prefix: str) -> Iterable[str]:
    """A checkpoint of a model with a head is one of its body but for a prefix, and either is loaded into the other."""
    yield name
    if prefix:
        yield name.removeprefix(prefix + ".")
        yield f"{prefix}.{name}"
