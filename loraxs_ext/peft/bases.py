"""Where the layers' bases come from: computed in one batch, grown for a larger rank, or taken from a file."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor

from loraxs_ext import basis
from loraxs_ext.basis import Recipe
from loraxs_ext.layers import CoreMatrix, LoraXSLayer

from .config import BasisCheck
from .verify import Mismatch, current_factors, flip_signs, measure, record, report, transport


@dataclass(eq=False)
class AdapterBasis:
    """The bases of one adapter in the layers of one model, which all hold the same object; a `layers.BasisPolicy`.

    Args:
        adapter: its name.
        recipe: how a basis is computed; the same for all adapters of a model, which share one basis per layer.
        check: what to do when a loaded R was trained on another basis.
        tol: largest accepted difference, as `measure` gives it.
        layers: the layers that were given the adapter. Weak references: unloading frees layer after layer.
    """

    adapter: str
    recipe: Recipe
    check: BasisCheck
    tol: float
    layers: weakref.WeakSet[LoraXSLayer] = field(default_factory=weakref.WeakSet)

    def settle(self, layer: LoraXSLayer | None = None) -> None:
        """Give every layer its basis, and express the R that came in on it.

        All layers are treated at once, whichever asked: one batched decomposition, one message with the worst layer.
        Layers on the meta device are left for later.

        Raises:
            ValueError: a basis differs by more than `tol`, and `check` is "error"; no R has changed then.
        """
        if layer is not None:
            self.layers.add(layer)
        pending = sorted((m for m in self.layers if self._is_pending(m)), key=lambda m: m.key)
        if not pending:
            return
        # The first forward pass may ask, under autocast (which would round) or in inference mode (whose tensors could
        # never be trained with).
        device = pending[0].get_base_layer_device().type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            self._settle(pending)

    def _settle(self, pending: Sequence[LoraXSLayer]) -> None:
        for layer in pending:
            self._adopt_stored(layer)
        compute_bases(pending, {layer.key: layer.r[self.adapter] for layer in pending}, self.recipe)
        moved = [self._rebased(layer) for layer in pending]
        mismatches = [Mismatch(layer.key, error) for layer, (_, error) in zip(pending, moved, strict=True)]
        report(self.adapter, mismatches, self.check, self.tol, self.recipe.tol)
        for layer, (weight, _) in zip(pending, moved, strict=True):
            core = self._core(layer)
            if weight is not core.weight:
                core.weight.copy_(weight)
            record(layer, self.adapter)

    def refuse_wrong_base(self, sketches: Mapping[str, Tensor]) -> None:
        """Raise now if R matrices with these sketches, by layer key, would be refused once loaded.

        Layers whose basis is still to come are not judged here, and nothing is warned of twice.
        """
        known = [m for m in self.layers if m.key in sketches and m.basis_rank >= m.r.get(self.adapter, 1)]
        known = [m for m in known if sketches[m.key].shape == self._core(m).recorded_sketch.shape]
        found = [Mismatch(m.key, measure(m, self.adapter, sketches[m.key])[1]) for m in known]
        if self.check == "error" and any(not m.error <= self.tol for m in found):
            report(self.adapter, found, self.check, self.tol, self.recipe.tol)

    def _core(self, layer: LoraXSLayer) -> CoreMatrix:
        return layer.core(self.adapter)

    def _is_pending(self, layer: LoraXSLayer) -> bool:
        if self.adapter not in layer.loraxs_R or self._core(layer).settled:
            return False
        return "meta" not in (layer.get_base_layer_device().type, self._core(layer).weight.device.type)

    def _adopt_stored(self, layer: LoraXSLayer) -> None:
        """Make the basis stored with the adapter the layer's, unless another adapter already stands on that."""
        core = self._core(layer)
        if core.stored_basis is None or any(layer.core(name).settled for name in layer.loraxs_R):
            return
        layer.set_basis(*core.stored_basis)

    def _rebased(self, layer: LoraXSLayer) -> tuple[Tensor, float]:
        """R of the adapter on the layer's basis, and how much is lost by that."""
        core = self._core(layer)
        if core.stored_basis is None:
            signs, error = measure(layer, self.adapter, core.recorded_sketch)
            return flip_signs(core.weight, signs), error
        mine = current_factors(layer, core.rank)[:2]
        if all(torch.equal(now, stored.to(now)) for now, stored in zip(mine, core.stored_basis, strict=True)):
            return core.weight, 0.0
        return transport(core.weight, core.stored_basis, mine)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or unpickled layer makes itself known when it next asks for its basis.
        return {**self.__dict__, "layers": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, layers=weakref.WeakSet())


def compute_bases(layers: Sequence[LoraXSLayer], ranks: Mapping[str, int], recipe: Recipe) -> None:
    """Give each layer a basis of at least ranks[layer.key] rows: all new ones in one batch, rows already there kept.

    Layers that share one weight share one basis.
    """
    by_weight: dict[int, list[LoraXSLayer]] = {}
    for layer in layers:
        if layer.basis_rank < ranks[layer.key]:
            by_weight.setdefault(_weight_id(layer), []).append(layer)
    new: dict[str, tuple[LoraXSLayer, list[LoraXSLayer], int]] = {}
    grown: dict[str, tuple[LoraXSLayer, list[LoraXSLayer], int]] = {}
    for group in by_weight.values():
        rank = max(ranks[layer.key] for layer in group)
        owner = max(group, key=lambda layer: layer.basis_rank)
        (grown if owner.basis_rank else new)[owner.key] = (owner, group, rank)
    factors = {}
    if new:
        weights = {key: partial(_load_weight, owner) for key, (owner, _, _) in new.items()}
        ranks = {key: rank for key, (_, _, rank) in new.items()}
        factors = basis.decompose(weights, ranks, recipe, cache_dir="default")
    for key, (owner, _, rank) in grown.items():
        factors[key] = basis.extend(current_factors(owner, owner.basis_rank), _load_weight(owner), rank, recipe)
    for key, (owner, group, _) in {**new, **grown}.items():
        owner.set_basis(factors[key].a, factors[key].bt)
        for layer in group:
            layer.loraxs_A, layer.loraxs_Bt = owner.loraxs_A, owner.loraxs_Bt


def combined_fingerprint(layers: Iterable[LoraXSLayer]) -> str | None:
    """64 bits of the weights of all `layers` in hex; None if there are none, or one waits on the meta device.

    Each layer is hashed once, when it is first asked for: loading and serving never need it.
    """
    parts = []
    for layer in sorted(layers, key=lambda layer: layer.key):
        if layer.base_fingerprint is None:
            if layer.get_base_layer_device().type == "meta":
                return None
            layer.base_fingerprint = basis.fingerprint(_load_weight(layer))
        parts.append((layer.key, layer.base_fingerprint))
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest() if parts else None


def _weight_id(layer: LoraXSLayer) -> int:
    base = layer.get_base_layer()
    return id(layer.unmerged_weight[0] if layer.unmerged_weight else getattr(base, "weight", base))


def _load_weight(layer: LoraXSLayer) -> Tensor:
    """W [N, K] from wherever offloading or sharding keeps it."""
    with onload_layer(layer), gather_params_ctx(list(layer.get_base_layer().parameters())):
        weight = layer.frozen_weight().detach()
    if layer.quantization_backend is not None and layer.base_fingerprint is None:
        # While it can be read: some quantised weights are repacked when they are first used.
        layer.base_fingerprint = basis.fingerprint(weight)
    return weight
