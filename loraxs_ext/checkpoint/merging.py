"""An adapter folded into the weights of its base model, from folder to folder, one tensor at a time."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from loraxs_ext.files import atomic_folder, read_json, write_json
from loraxs_ext.files.safetensors import FLOATS, Entry, entry, write_shard
from loraxs_ext.layers import LoraXSLayer, MergeLossWarning, rounding_loss
from loraxs_ext.layers.merge import LOSS_WORTH_A_WARNING

from .model_folder import INDEX, INDEX_LIMIT, Target, TensorNames
from .streaming import StreamedModel

# What a model folder holds beside weights: configurations, tokenizers, templates, code. Anything else stays behind.
_COMPANIONS = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".py"}


@dataclass
class Merged:
    """What `merge` did.

    Attributes:
        losses: by module key, ‖rounding error‖ / ‖ΔW‖ of the stored weight.
        replaced: other tensors taken from the adapter, heads and biases, that took the place of those of the base.
        added: tensors that the base did not store: heads that it lacks, and weights that are no longer tied.
        nbytes: of all tensors written.
    """

    losses: dict[str, float] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    nbytes: int = 0


def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Merged:
    """Write the plain model W + s·B R A: the folder of the base with the adapter folded into its weights.

    Weights are read, merged in fp32 (fp64 for fp64), rounded once and written one by one, into shards like those of the
    base; one weight and its basis are held at a time. Heads and biases that the adapter brings take the place of those
    of the base, or are added. Bases come from where loading takes them, and R is verified, and transported, in the same
    way. The folder appears whole or not at all; what a killed call leaves behind, the next one replaces.

    Args:
        base: folder of the model with config.json and safetensors, not quantised.
        adapter: folder of a LoRA-XS adapter.
        output: folder to be made.
        dtype: of all floating-point tensors of the result; None to keep those of the base.
        overwrite: replace a model that is there.
        progress: show a bar.

    Raises:
        ValueError: the adapter was trained on another base (with numbers), or a folder is not what it should be.
        FileExistsError: `output` exists.
        BlockingIOError: another process is writing the same `output`.

    Warns:
        MergeLossWarning: rounding took away a noticeable part of an update; the worst module is named.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype: expected fp64, fp32, bf16 or fp16, got {dtype}")
    with atomic_folder(output, overwrite=overwrite) as folder:
        model = StreamedModel.open(base, adapter)
        merger = _Merger(model, dtype)
        try:
            merger.write(folder, progress)
        finally:
            model.close()
        model.finish()
        _copy_companions(base, folder, merger.changes_of_config())
    worst = max(merger.done.losses, key=merger.done.losses.__getitem__)
    if merger.done.losses[worst] > LOSS_WORTH_A_WARNING:
        warnings.warn(MergeLossWarning(worst, merger.done.losses[worst]), stacklevel=2)
    return merger.done


class _Merger:
    """Plans which tensor of the result comes from where, then writes it.

    Args:
        model: base and adapter.
        dtype: of the result; None for that of the base.
    """

    def __init__(self, model: StreamedModel, dtype: torch.dtype | None) -> None:
        self.model, self.dtype, self.done = model, dtype, Merged()
        if any(".token_adapter." in name for name, _ in model.base.named_parameters()):
            raise ValueError(
                "trainable_token_indices: expected none, got an adapter that trained rows of an embedding; load it and "
                "use merge_and_unload"
            )
        self.names = TensorNames(model.folder, model.base)
        self.brought = model.brought()
        self.targets = {f"{target.key}.weight": target for target in model.targets}
        self.own = {name: self.names.find_own(name) for name in (*self.targets, *self.brought)}
        # Which parameter each stored tensor is replaced by.
        self.replaces = {stored: name for name, stored in self.own.items() if stored is not None}
        changed = {name for name in self.own if name in self.names.tied}
        changed |= {source for source in self.names.tied.values() if source in self.own}
        self.untied = sorted(self.names.tied) if changed else []
        if changed and getattr(model.base.config, "is_encoder_decoder", False):
            raise ValueError(
                f"the adapter changes {sorted(changed)[0]}, which the model ties to another weight; an encoder-decoder "
                f"cannot be stored otherwise. Load the adapter and use merge_and_unload"
            )
        self.added = [name for name, stored in self.own.items() if stored is None]
        self.added += [name for name in self.untied if name not in self.own and self.names.find_own(name) is None]
        self.done.replaced = sorted(name for name in self.brought if self.own[name] is not None)
        self.done.added = sorted(self.added)
        body = f"{self.names.prefix}."
        keys = {name.removeprefix(body) for name in _plain_names(model.base) if name.startswith(body)}
        whole = any(name.startswith(body) for name in self.names.shards)
        # A checkpoint of the body alone gets the names of the model with its head.
        self._in_body = keys if not whole else set()

    def write(self, folder: Path, progress: bool) -> None:
        """Write all shards, and the index if the base has one."""
        shards: dict[Path, list[str]] = {}
        for name, path in self.names.shards.items():
            shards.setdefault(path, []).append(name)
        total = sum(path.stat().st_size for path in shards)
        weight_map: dict[str, str] = {}
        with tqdm(total=total, desc="merge", unit="B", unit_scale=True, disable=None if progress else True) as bar:
            for path, names in sorted(shards.items()):
                with safe_open(path, framework="pt") as file:
                    entries = [self._stored(file, name) for name in names]
                    entries += [self._addition(name) for name in self.added if self._shard_of(name) == path]
                    # The widest first, so that every tensor is aligned.
                    entries.sort(key=lambda one: -one.nbytes // max(torch.Size(one.shape).numel(), 1))
                    for one in write_shard(folder / path.name, entries, file.metadata() or {"format": "pt"}):
                        bar.update(one.nbytes)
                        self.done.nbytes += one.nbytes
                        weight_map[one.name] = path.name
        if (self.model.folder / INDEX).is_file():
            index = read_json(self.model.folder / INDEX, INDEX_LIMIT)
            about = index.get("metadata")
            text = {
                "metadata": {**(about if isinstance(about, dict) else {}), "total_size": self.done.nbytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(folder / INDEX, text)

    def changes_of_config(self) -> dict[str, Any]:
        """Fields of config.json that the result has otherwise than the base."""
        config: Any = self.model.base.config
        changes: dict[str, Any] = {}
        name = type(self.model.base).__name__
        if any(stored is None and name not in self.names.tied for name, stored in self.own.items()):
            changes |= {"architectures": [name], "id2label": config.id2label, "label2id": config.label2id}
        if self.untied:
            changes["tie_word_embeddings"] = False
        if self.dtype is not None:
            changes["dtype"] = changes["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        return changes

    def _stored(self, file: Any, stored: str) -> Entry:
        """The entry of what the base stores under the name `stored`."""
        about = file.get_slice(stored)
        kind, shape = about.get_dtype(), tuple(about.get_shape())
        name = f"{self.names.prefix}.{stored}" if stored in self._in_body else stored
        if kind not in FLOATS:
            tensor = file.get_tensor(stored)
            return Entry(name, kind, shape, tensor.numel() * tensor.element_size(), partial(file.get_tensor, stored))
        dtype = self.dtype or FLOATS[kind]
        if stored in self.replaces:
            return entry(name, dtype, shape, self._maker(self.replaces[stored], dtype, shape))
        return entry(name, dtype, shape, lambda: file.get_tensor(stored).to(dtype))

    def _addition(self, name: str) -> Entry:
        """The entry of a parameter that the base does not store."""
        twin = self.names.find(name) or next(iter(self.names.shards))
        path = self.names.shards[twin]
        with safe_open(path, framework="pt") as file:
            about = file.get_slice(twin)
            dtype = self.dtype or FLOATS.get(about.get_dtype(), torch.float32)
            twin_shape = tuple(about.get_shape())
        if name in self.own:
            shape = tuple(self.brought[name].shape) if name in self.brought else twin_shape
            return entry(name, dtype, shape, self._maker(name, dtype, shape))
        return entry(name, dtype, twin_shape, partial(_read, path, twin, dtype))

    def _shard_of(self, name: str) -> Path:
        """Where an addition goes: to its twin, or to the end."""
        twin = self.names.find(name)
        return self.names.shards[twin] if twin else max(self.names.shards.values())

    def _maker(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        """What returns the new value of a parameter."""
        if name in self.targets:
            return partial(self._merged, self.targets[name], dtype)
        if tuple(self.brought[name].shape) != shape:
            raise ValueError(
                f"{name}: expected {list(shape)} as in the base, got {list(self.brought[name].shape)} from the adapter"
            )
        return partial(self.brought[name].to, dtype)

    def _merged(self, target: Target, dtype: torch.dtype) -> Tensor:
        with self.model.at(target) as layer:
            merged, loss = merged_weight(layer, self.model.adapter, dtype)
        self.done.losses[target.key] = loss
        return merged


def merged_weight(layer: LoraXSLayer, adapter: str, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The weight with the adapter folded in, in the layout of the base layer, and what rounding it to `dtype` lost.

    Raises:
        ValueError: the result is not finite.
    """
    base: Any = layer.get_base_layer()
    frozen = base.weight
    # Merging rounds to the dtype of the weight: to none yet.
    exact = torch.float64 if frozen.dtype == torch.float64 else torch.float32
    base.weight = nn.Parameter(frozen.to(exact), requires_grad=False)
    merging: Any = layer
    merging.merge(safe_merge=True, adapter_names=[adapter])
    stored = base.weight.detach().to(dtype)
    if not torch.isfinite(stored).all():
        raise ValueError(f"{layer.key}: expected a merged weight that {dtype} can hold, got one beyond its range")
    return stored, rounding_loss(frozen, base.weight.detach() - frozen.to(exact), stored)


def _read(path: Path, name: str, dtype: torch.dtype) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).to(dtype)


def _plain_names(base: nn.Module) -> Iterator[str]:
    """Names of the parameters of the base model without the adapter's wrappers."""
    for name, _ in base.named_parameters():
        if ".loraxs_" not in name and ".modules_to_save." not in name:
            yield name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _copy_companions(base: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    """Copy what is no weight, and write `changes` to the configuration."""
    for parent, inner, files in os.walk(base):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            source = Path(parent, name)
            path = folder / source.relative_to(base)
            wanted = source.suffix in _COMPANIONS and not name.endswith(".index.json") and not name.startswith(".")
            if wanted and source.is_file() and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, path)
    if changes:
        fields = read_json(base / "config.json")
        fields |= {name: value for name, value in changes.items() if name != "torch_dtype" or name in fields}
        inner_fields = fields.get("text_config")
        if isinstance(inner_fields, dict) and "tie_word_embeddings" in changes:
            inner_fields["tie_word_embeddings"] = False
        write_json(folder / "config.json", fields)
