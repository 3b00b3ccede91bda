"""Adapters of `ManyAdapters` in files: ordinary PEFT folders, a store, and all of them in one file for checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from loraxs_ext.basis.tensor_file import Layout, TensorFile, write_tensors
from loraxs_ext.files import atomic_folder
from loraxs_ext.training.start import continue_from

from .model import ManyAdapters
from .template import TEMPLATE

_FORMAT = "loraxs many adapters 1"


def save_folders(many: ManyAdapters, folder: str | Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write each adapter as PEFT writes it when it was trained alone, to `folder`/<name>.

    Args:
        many: holds the adapters.
        folder: made if it is not there; an adapter of that name in it is replaced as a whole.
        names: which; None for all.

    Raises:
        ValueError: a name is not that of a folder.
        FileExistsError: there is something of that name that is no adapter, or that holds another.
    """
    saved = []
    for name in many.names if names is None else names:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"names: expected a name that can be a folder's, got {name!r}")
        path = Path(folder) / name
        with _in_template(many, name), atomic_folder(path, overwrite=True) as staged:
            many.model.save_pretrained(str(staged))
        saved.append(path)
    return saved


def load_folder(many: ManyAdapters, name: str, folder: str | Path) -> None:
    """Take over an adapter that PEFT wrote; its basis is compared as whenever one is loaded.

    Args:
        many: has a slot of that name.
        name: of the adapter.
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        ValueError: it differs from the template in rank, scaling, basis or targets.
    """
    with _in_template(many, name):
        continue_from(many.model, str(folder), "none", argument=name)
        for layer in many.layers:
            layer.settle(TEMPLATE)
        loaded = torch.cat([layer.get_R(TEMPLATE).detach().flatten() for layer in many.layers])
    set_row(many, name, loaded)


@torch.no_grad()
def set_row(many: ManyAdapters, name: str, numbers: Tensor) -> None:
    """Replace an adapter by numbers [layout.size].

    Raises:
        ValueError: they are not as many.
    """
    if numbers.shape != (many.layout.size,):
        raise ValueError(f"numbers: expected [{many.layout.size}], got {list(numbers.shape)}")
    many.rows[many.slot_of[name]] = numbers.to(many.rows)


def save_all(many: ManyAdapters, path: Path) -> None:
    """All adapters in one file, for `load_all`; it appears under its name complete and synced."""
    write_tensors(path, {"rows": many.rows.detach()}, _metadata(many))


@torch.no_grad()
def load_all(many: ManyAdapters, path: Path) -> None:
    """Read what `save_all` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or of other adapters.
    """
    try:
        with TensorFile(path) as file:
            file.expect(_metadata(many), {"rows": Layout(many.rows.dtype, tuple(many.rows.shape))})
            many.rows.copy_(file.read("rows"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _metadata(many: ManyAdapters) -> dict[str, str]:
    return {"format": _FORMAT, "names": json.dumps(many.names), "layout": many.layout.to_json()}


@contextmanager
def _in_template(many: ManyAdapters, name: str) -> Iterator[None]:
    """Inside the context, the template is a copy of the adapter."""
    config, seed, cores = many.template_config, many.template_config.init_seed, {}
    parts = many.row(name).numbers.split([segment.r**2 for segment in many.layout.segments])
    try:
        config.init_seed = many.seeds[many.slot_of[name]]
        for layer, part in zip(many.layers, parts, strict=True):
            cores[layer] = layer.core(TEMPLATE)
            layer.loraxs_R[TEMPLATE] = copy.deepcopy(cores[layer])
            own = layer.get_R(TEMPLATE)
            own.detach().copy_(part.view_as(own))
        yield
    finally:
        config.init_seed = seed
        for layer, core in cores.items():
            layer.loraxs_R[TEMPLATE] = core
