"""Where the layers' bases come from, and how a loaded R gets onto them: the policy of one adapter."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraxs_ext import basis
from loraxs_ext.basis import BasisFile, Factors, Recipe
from loraxs_ext.basis.anchor import SAME_ORIGIN
from loraxs_ext.layers import Core, LoraXSLayer, complete

from .config import BasisCheck, LoraXSConfig
from .swapping import settle_scaling
from .transport import Restored, Source, anchors_path, remember, restore, transport
from .verify import Mismatch, current_factors, flip_signs, is_foreign, measure, record, report
from .weights import compute_bases, load_weight


class _Plan(NamedTuple):
    """What becomes of a layer: its `Core.on_basis`, the basis that replaces its own, if any, and what that costs."""

    core: Tensor
    factors: Factors | None
    mismatch: Mismatch


@dataclass(eq=False)
class AdapterBasis:
    """The bases of one adapter in the layers of one model, which all hold the same object; a `layers.BasisPolicy`.

    Args:
        adapter: its name.
        recipe: how a basis is computed; the same for all adapters of a model, which share one basis per layer.
        check: what to do when a loaded R was trained on another basis.
        tol: largest accepted difference, as `measure` gives it.
        basis_file: path of a file of bases, or anchors, of the model; None for none.
        config: of the adapter, whose alpha follows a hot swap; None where there are none.
        layers: the layers that were given the adapter. Weak references: unloading frees layer after layer.
    """

    adapter: str
    recipe: Recipe
    check: BasisCheck
    tol: float
    basis_file: str | None = None
    config: LoraXSConfig | None = None
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
        if self.config is not None:
            settle_scaling(self.config, [m for m in self.layers if self.adapter in m.loraxs_R], self.adapter)
        pending = sorted((m for m in self._sites() if self._is_pending(m)), key=lambda m: m.key)
        if not pending:
            return
        # The first forward pass may ask, under autocast (which would round) or in inference mode (whose tensors could
        # never be trained with).
        device = pending[0].get_base_layer_device().type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            unsettled = [layer for layer in pending if not self._core(layer).settled]
            if unsettled:
                self._settle(unsettled)
            for layer in pending:
                layer.settle_magnitudes(partial(load_weight, layer))

    def _settle(self, pending: Sequence[LoraXSLayer]) -> None:
        for layer in pending:
            self._adopt_stored(layer)
        with self._open_file() as file:
            made = {} if file is None or not file.has_factors else self._take(pending, file)
            made |= compute_bases(pending, {layer.key: layer.r[self.adapter] for layer in pending}, self.recipe)
            sketches = {m.key: self._core(m).recorded_sketch for m in pending if self._core(m).stored_basis is None}
            restored = self._restored(pending, sketches, file)
        plans = [self._plan(layer, restored.get(layer.key)) for layer in pending]
        self._judge([plan.mismatch for plan in plans])
        for layer, plan in zip(pending, plans, strict=True):
            core = self._core(layer)
            if plan.factors is not None:
                layer.set_basis(plan.factors.a, plan.factors.bt)
                made[layer.key] = plan.factors
            core.place(plan.core)
            sketches[layer.key] = record(layer, self.adapter)
        self._remember([layer for layer in pending if self._core(layer).stored_basis is None], sketches, made)

    def refuse_wrong_base(self, sketches: Mapping[str, Tensor]) -> None:
        """Raise now if R matrices with these sketches, by layer key, would be refused once loaded.

        Layers whose basis is still to come are not judged here, and nothing is warned of twice.
        """
        known = [m for m in self._sites() if m.key in sketches and m.basis_rank >= m.r.get(self.adapter, 1)]
        known = [m for m in known if sketches[m.key].shape == self._core(m).recorded_sketch.shape]
        found = [Mismatch(m.key, measure(m, self.adapter, sketches[m.key])[1]) for m in known]
        if self.check != "error" or not any(is_foreign(m, self.tol) for m in found):
            return
        with self._open_file() as file:
            restored = self._restored(known, {m.key: sketches[m.key] for m in known}, file)
        found = [_better(mismatch, restored.get(mismatch.key))[0] for mismatch in found]
        if any(is_foreign(m, self.tol) for m in found):
            report(self.adapter, found, self.check, self.tol, self.recipe.tol)

    def _judge(self, mismatches: Sequence[Mismatch]) -> None:
        """Raise, warn or pass. May be overridden, by who treats the layers one by one."""
        report(self.adapter, mismatches, self.check, self.tol, self.recipe.tol)

    def _anchors_path(self, sketches: Mapping[str, Tensor]) -> Path:
        """Where the anchors of the adapter are cached. May be overridden, by who has more sketches than these."""
        return anchors_path(sketches, self.recipe)

    @contextlib.contextmanager
    def _open_file(self) -> Iterator[BasisFile | None]:
        """The basis file of the configuration, if there is one."""
        if self.basis_file is None:
            yield None
            return
        if not Path(self.basis_file).exists():
            # A path says little on another machine; whether R fits the basis that is computed instead is checked.
            warnings.warn(
                f"LoRA-XS adapter {self.adapter!r}: basis_file: expected a file of bases, got {self.basis_file!r}, "
                f"which does not exist; the bases are computed from the weights.",
                stacklevel=2,
            )
            yield None
            return
        with BasisFile(self.basis_file) as file:
            if file.recipe != self.recipe:
                raise ValueError(
                    f"basis_file: expected bases made by {self.recipe}, got {self.basis_file} made by {file.recipe}"
                )
            yield file

    def _take(self, pending: Sequence[LoraXSLayer], file: BasisFile) -> dict[str, Factors]:
        """Give layers without a basis the one in the file, once it is known to belong to their weights."""
        found: dict[str, Factors] = {}
        fits = []
        bare = [layer for layer in pending if not layer.basis_rank]
        for layer in bare:
            name = file.find(layer.key)
            if name is None:
                continue
            shape = (layer.out_features, layer.in_features)
            if file.modules[name].shape != shape:
                raise ValueError(
                    f"basis_file: expected a basis of {name} for shape {shape}, got {self.basis_file} with one for "
                    f"{file.modules[name].shape}"
                )
            factors = file.factors(name)
            weight = load_weight(layer)
            layer.base_fingerprint = basis.fingerprint(weight)
            same = layer.base_fingerprint == factors.fingerprint
            residual = 0.0 if same else basis.fit_error(factors, weight, self.recipe.sigma)
            fits.append(Mismatch(layer.key, 0.0, residual))
            found[layer.key] = factors
        report(self.adapter, fits, self.check, self.tol, self.recipe.tol)
        if len(found) < len(bare):
            lacking = next(layer.key for layer in bare if layer.key not in found)
            warnings.warn(
                f"LoRA-XS adapter {self.adapter!r}: basis_file: expected bases of {len(bare)} modules, got "
                f"{self.basis_file} without {len(bare) - len(found)} of them, such as {lacking}; those are computed.",
                stacklevel=2,
            )
        for layer in bare:
            if layer.key in found:
                layer.set_basis(found[layer.key].a, found[layer.key].bt)
        return found

    def _restored(
        self, layers: Sequence[LoraXSLayer], sketches: Mapping[str, Tensor], file: BasisFile | None
    ) -> dict[str, Restored]:
        """The old bases of the layers whose basis differs from that of their sketch, where anchors of them are kept."""
        doubtful = {
            layer.key: layer
            for layer in layers
            if layer.key in sketches and measure(layer, self.adapter, sketches[layer.key])[1] > self.recipe.tol
        }
        if not doubtful:
            return {}
        weights = {
            key: Source((layer.out_features, layer.in_features), partial(load_weight, layer))
            for key, layer in doubtful.items()
        }
        found = {}
        if file is not None:
            found = restore(file, {key: sketches[key] for key in doubtful}, weights, self.recipe)
        cached = self._anchors_path(sketches)
        if len(found) < len(doubtful) and cached.exists():
            rest = {key: sketches[key] for key in doubtful if key not in found}
            try:
                with BasisFile(cached) as anchors:
                    found |= restore(anchors, rest, weights, self.recipe)
            except ValueError as reason:
                warnings.warn(f"cached anchors are not used: {reason}", RuntimeWarning, stacklevel=2)
        return found

    def _plan(self, layer: LoraXSLayer, restored: Restored | None) -> _Plan:
        core = self._core(layer)
        if core.stored_basis is not None:
            mine = current_factors(layer, core.rank)[:2]
            if all(torch.equal(now, stored.to(now)) for now, stored in zip(mine, core.stored_basis, strict=True)):
                return _Plan(core.on_basis, None, Mismatch(layer.key, 0.0))
            moved, lost = transport(complete(core.on_basis), core.stored_basis, mine)
            return _Plan(moved, None, Mismatch(layer.key, lost))
        signs, error = measure(layer, self.adapter, core.recorded_sketch)
        mismatch, old = _better(Mismatch(layer.key, error), restored)
        if old is None:
            return _Plan(flip_signs(core.on_basis, signs), None, mismatch)
        if not any(layer.core(name).settled for name in layer.loraxs_R):
            return _Plan(core.on_basis, old, mismatch)
        # Other adapters stand on the layer's basis, so R has to move.
        moved, lost = transport(complete(core.on_basis), (old.a, old.bt), current_factors(layer, core.rank)[:2])
        return _Plan(moved, None, mismatch._replace(error=max(mismatch.error, lost)))

    def _remember(
        self, layers: Sequence[LoraXSLayer], sketches: Mapping[str, Tensor], made: Mapping[str, Factors]
    ) -> None:
        """Keep the anchors of the bases the adapter now stands on, made of unrounded factors where there are such."""
        sketches = {layer.key: sketches[layer.key] for layer in layers}
        # A layer whose weights were never read has the basis of an adapter that carries it along.
        if not layers or anchors_path(sketches, self.recipe).exists() or not all(m.base_fingerprint for m in layers):
            return
        factors = {}
        for layer in layers:
            rank = layer.r[self.adapter]
            found = (made.get(layer.key) or current_factors(layer, rank)).cut(rank)
            a, bt = (part if part.dtype == torch.float64 else part.float() for part in (found.a, found.bt))
            factors[layer.key] = found._replace(a=a, bt=bt, fingerprint=layer.base_fingerprint)
        remember(sketches, factors, self.recipe)

    def _sites(self) -> Iterator[LoraXSLayer]:
        return (site for layer in self.layers for site in layer.sites)

    def _core(self, layer: LoraXSLayer) -> Core:
        return layer.core(self.adapter)

    def _is_pending(self, layer: LoraXSLayer) -> bool:
        if self.adapter not in layer.loraxs_R or layer.is_settled(self.adapter):
            return False
        return "meta" not in (layer.get_base_layer_device().type, self._core(layer).device.type)

    def _adopt_stored(self, layer: LoraXSLayer) -> None:
        """Make the basis stored with the adapter the layer's, unless another adapter already stands on that."""
        core = self._core(layer)
        if core.stored_basis is None or any(layer.core(name).settled for name in layer.loraxs_R):
            return
        layer.set_basis(*core.stored_basis)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or unpickled layer makes itself known when it next asks for its basis.
        return {**self.__dict__, "layers": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, layers=weakref.WeakSet())


def _better(mismatch: Mismatch, restored: Restored | None) -> tuple[Mismatch, Factors | None]:
    """The mismatch, and the basis to stand on instead of the layer's: the restored one if that is nearer to the old."""
    if restored is None:
        return mismatch, None
    mismatch = mismatch._replace(residual=restored.residual)
    if restored.residual > SAME_ORIGIN or not restored.error < mismatch.error:
        return mismatch, None
    return mismatch._replace(error=restored.error), restored.factors
