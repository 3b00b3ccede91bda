"""The weights of a transformers model folder, one at a time and one shard at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from loraxs_ext.files import read_json
from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft import LoraXSConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# A model of 100,000 tensors has one of 10 MB.
INDEX_LIMIT = 1 << 28


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
    model = empty_model(folder)
    with warnings.catch_warnings():
        # PEFT asks models for attributes that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    return locate(folder, model, [module for module in adapted.modules() if isinstance(module, LoraXSLayer)])


def locate(folder: Path, model: nn.Module, layers: Sequence[LoraXSLayer]) -> list[Target]:
    """Where the weights of these layers lie, in the order of the shards.

    Args:
        folder: of the model.
        model: of `empty_model`, adapted or not.
        layers: of an adapter in it.

    Raises:
        ValueError: the folder lacks a weight.
    """
    names = TensorNames(folder, model)
    targets, missing = [], []
    for layer in layers:
        name = f"{layer.key}.weight"
        found = names.find(name)
        if found is None:
            missing.append(name)
            continue
        rank = next(iter(layer.r.values()))
        shape = (layer.out_features, layer.in_features)
        targets.append(Target(layer.key, shape, rank, names.shards[found], found, layer.fan_in_fan_out))
    if missing:
        raise ValueError(
            f"the checkpoint in {folder} lacks {len(missing)} of {len(missing) + len(targets)} targeted weights, such "
            f"as {missing[0]!r}; if transformers converts them when it loads the model, save the loaded model once"
        )
    return sorted(targets, key=lambda target: (target.shard, target.tensor))


class TensorNames:
    """The names of a model's tensors in its files.

    Args:
        folder: of the model.
        model: of `empty_model`.

    Attributes:
        shards: tensor name -> file.
        tied: name -> name of the tensor that is stored in its place.
        prefix: of the model's body, such as "bert".
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.shards = tensors_of(folder)
        keys: Any = getattr(model, "all_tied_weights_keys", None) or {}
        self.tied = {name: source for name, source in keys.items() if isinstance(source, str)}
        self.prefix = str(getattr(model, "base_model_prefix", ""))

    def find(self, name: str) -> str | None:
        """The stored tensor of the parameter `name`, that of its twin if the two are tied; None if there is none."""
        found = self.find_own(name)
        return self.find_own(self.tied[name]) if found is None and name in self.tied else found

    def find_own(self, name: str) -> str | None:
        """The stored tensor of the parameter `name` itself."""
        return next((spelling for spelling in self.spellings(name) if spelling in self.shards), None)

    def spellings(self, name: str) -> Iterable[str]:
        """A checkpoint of a model with a head is one of its body but for a prefix; either is loaded into the other."""
        yield name
        if self.prefix:
            yield name.removeprefix(self.prefix + ".")
            yield f"{self.prefix}.{name}"


@dataclass
class WeightStream:
    """Reads targets; the file of a shard stays open until another one is asked for.

    Args:
        dtype: the weights are rounded to, as the model will have them; None to leave them as stored.

    Attributes:
        energies: ‖W‖² by module key, of what has been read.
    """

    dtype: torch.dtype | None = None
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


def model_config(folder: Path) -> Any:
    """The transformers configuration of the model in `folder`.

    Raises:
        ValueError: there is none, or its weights are stored quantised.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL must be a folder of a transformers model, got {folder} without config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the weights in {folder} are stored quantised; use the original weights (prepare their bases and give the "
            f"file to LoraXSConfig(basis_file=…))"
        )
    return config


def empty_model(folder: Path, config: Any = None, class_name: str | None = None) -> nn.Module:
    """The model of a folder on the meta device.

    Args:
        folder: with config.json.
        config: instead of that of the folder.
        class_name: of transformers; by default the architecture that the configuration names.
    """
    config = model_config(folder) if config is None else config
    names = [class_name] if class_name else getattr(config, "architectures", None) or []
    known = [name for name in names if hasattr(transformers, name)]
    with torch.device("meta"):
        if not known:
            return transformers.AutoModel.from_config(config)
        model: Any = getattr(transformers, known[0])
        return model.from_config(config) if known[0].startswith("Auto") else model(config)


def tensors_of(folder: Path) -> Mapping[str, Path]:
    """Tensor name -> file.

    Raises:
        ValueError: there are no safetensors, or the index cannot be believed.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, INDEX_LIMIT)
        files = index.get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{folder / INDEX} must map names of tensors to names of files")
        if any(Path(file).name != file or not file.endswith(".safetensors") for file in files.values()):
            raise ValueError(f"{folder / INDEX} names files outside of its folder")
        return {name: folder / file for name, file in files.items()}
    if not (folder / SINGLE).is_file():
        raise ValueError(f"{folder} must hold {SINGLE} or {INDEX}; pickled weights are not read, save them again")
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)
