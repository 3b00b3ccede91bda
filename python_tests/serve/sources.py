"""Adapters in memory: a source of rows beside the PEFT model that holds the same adapters, which is the oracle."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from loraxs_ext.basis import sketch
from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft.verify import current_factors
from loraxs_ext.store import AdapterRow, RowLayout, Segment


class Shelf:
    """A `RowSource` in memory. Rows may be put anew, which makes another version.

    Args:
        manifest: recipe and sketches, as a store has; None for a source that does not know its basis.
    """

    def __init__(self, manifest: SimpleNamespace | None = None) -> None:
        self.rows: dict[str, AdapterRow] = {}
        if manifest is not None:
            self.manifest = manifest

    def version(self, name: str) -> int:
        return self.rows[name].version

    def row(self, name: str) -> AdapterRow:
        return self.rows[name]

    def put(self, name: str, row: AdapterRow) -> None:
        before = self.rows.get(name)
        self.rows[name] = row._replace(name=name, version=1 if before is None else before.version + 1)


def row_of(model: nn.Module, adapter: str) -> AdapterRow:
    """The adapter of a PEFT model as a row."""
    layers = [m for m in model.modules() if isinstance(m, LoraXSLayer) and adapter in m.r]
    layout = RowLayout(Segment(layer.key, layer.r[adapter], layer.scaling[adapter]) for layer in layers)
    numbers = torch.cat([layer.get_R(adapter).detach().flatten() for layer in layers])
    return AdapterRow(adapter, 1, layout, numbers.cpu())


def manifest_of(model: nn.Module, config) -> SimpleNamespace:
    """What a store of the adapters of a PEFT model says of their basis."""
    layers = [m for m in model.modules() if isinstance(m, LoraXSLayer)]
    sketches = {layer.key: sketch(current_factors(layer, max(layer.r.values()))) for layer in layers}
    ranks = {key: value.shape[1] for key, value in sketches.items()}
    return SimpleNamespace(recipe=config.recipe().to_dict(), config={}, sketches=sketches, ranks=ranks, fingerprint="")


def shelf_of(model, adapters: list[str], *, with_manifest: bool = True) -> Shelf:
    """A source of these adapters of a PEFT model."""
    config = next(iter(model.peft_config.values()))
    shelf = Shelf(manifest_of(model, config) if with_manifest else None)
    for name in adapters:
        shelf.put(name, row_of(model, name))
    return shelf
