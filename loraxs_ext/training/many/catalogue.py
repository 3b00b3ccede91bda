"""Adapters of `ManyAdapters` in a store and from one, without a folder in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraxs_ext.peft.weights import combined_fingerprint
from loraxs_ext.store import AdapterStore, Manifest, in_dtype

from .files import set_row
from .model import ManyAdapters
from .template import TEMPLATE

_CONFIG = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
# Two machines compute the basis of the same weights to its tolerance, 1e-3; another basis is about 1 away.
_SKETCH_TOLERANCE = 1e-2


def manifest_of(many: ManyAdapters) -> Manifest:
    """What a store of these adapters stands on."""
    config = many.template_config
    fields: dict[str, Any] = {name: getattr(config, name) for name in _CONFIG}
    if not isinstance(fields["target_modules"], str):
        fields["target_modules"] = sorted(fields["target_modules"])
    sketches = {layer.key: layer.core(TEMPLATE).recorded_sketch.cpu() for layer in many.layers}
    fingerprint = combined_fingerprint(many.layers) or ""
    return Manifest(fingerprint, config.recipe().to_dict(), {"peft_type": "LORAXS", **fields}, sketches)


def save_to_store(
    many: ManyAdapters, store: AdapterStore | str | Path, names: Sequence[str] | None = None
) -> list[int]:
    """Put adapters into a store in one transaction: all of them or none.

    Args:
        many: holds the adapters.
        store: or the folder of one, which is made if it is not there.
        names: which; None for all.

    Returns:
        Their new versions.

    Raises:
        ValueError: the store is of another basis, or for smaller ranks.
    """
    if isinstance(store, AdapterStore):
        _check_basis(many, store)
        return store.put_many([many.row(name) for name in (many.names if names is None else names)])
    folder = Path(store)
    opened = AdapterStore(folder) if folder.exists() else AdapterStore.create(folder, manifest_of(many))
    with opened:
        return save_to_store(many, opened, names)


def load_from_store(many: ManyAdapters, store: AdapterStore, names: Sequence[str] | None = None) -> None:
    """Take over adapters of a store, to go on with their training.

    Args:
        many: has slots of these names.
        store: of the same basis.
        names: which; None for all of `many`.

    Raises:
        KeyError: the store has no such adapter.
        ValueError: it is of another basis, rank or scaling.
    """
    _check_basis(many, store)
    for name in many.names if names is None else names:
        row = store.row(name)
        if row.layout != many.layout:
            raise ValueError(f"store {store.path}: adapter {name!r}: expected {many.layout}, got {row.layout}")
        set_row(many, name, in_dtype(row, torch.float32).numbers)


def _check_basis(many: ManyAdapters, store: AdapterStore) -> None:
    ours, theirs = manifest_of(many), store.manifest
    if theirs.recipe != ours.recipe:
        raise ValueError(f"store {store.path}: expected the recipe {ours.recipe}, got {theirs.recipe}")
    if theirs.fingerprint and ours.fingerprint and theirs.fingerprint != ours.fingerprint:
        got = f"adapters of the base {theirs.fingerprint}"
        raise ValueError(f"store {store.path}: expected adapters of the base {ours.fingerprint}, got {got}")
    for key, sketch in ours.sketches.items():
        found = theirs.sketches.get(key)
        if found is None or found.shape[1] < sketch.shape[1]:
            got = "none" if found is None else f"rank {found.shape[1]}"
            raise ValueError(f"store {store.path}: {key}: expected a basis of rank {sketch.shape[1]}, got {got}")
        distance = float((found[:, : sketch.shape[1]] - sketch).norm() / sketch.norm())
        if not distance <= _SKETCH_TOLERANCE:
            raise ValueError(f"store {store.path}: {key}: expected the same basis, got one {distance:.1e} away")
