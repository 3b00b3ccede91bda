"""LoRA-XS layers for a pool: put into a model, or found there, on the basis that the adapters were trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from loraxs_ext.basis import Recipe
from loraxs_ext.layers import (
    CoreMatrix,
    LoraXSLayer,
    LoraXSLinear,
    ParamWrapper,
    guard_packed_weights,
    share_projections,
)
from loraxs_ext.peft.bases import AdapterBasis
from loraxs_ext.peft.config import BasisCheck
from loraxs_ext.peft.dispatch import layer_class, quantization_options

# In every layer of a pool, the one adapter that stands for all of them: it has their basis, and nobody uses its R.
POOL = "loraxs_pool"


@dataclass(frozen=True)
class Footing:
    """What the adapters of a source stand on.

    Attributes:
        recipe: how their bases are computed.
        ranks: the largest rank of an adapter by module key.
        sketches: fp32 [5, r] of those bases by module key; modules that are absent cannot be checked.
        check, tol, basis_file: as `basis_check`, `basis_tol` and `basis_file` of LoraXSConfig.
    """

    recipe: Recipe
    ranks: Mapping[str, int]
    sketches: Mapping[str, Tensor] = field(default_factory=dict)
    check: BasisCheck = "error"
    tol: float = 0.1
    basis_file: str | None = None


class Placement:
    """The LoRA-XS layers of a pool in a model, on the basis of its adapters. Nothing in them is trainable.

    A targeted module without a LoRA-XS layer gets one, which shares its weights. One that has a layer keeps it, and
    the adapters in it.

    Args:
        model: the transformers model itself.
        footing: of the adapters.
        rank: that every layer is made for, cut to min(N, K) in small ones; None for those of `footing`.

    Attributes:
        layers: in the order of the model.

    Raises:
        ValueError: the model lacks a module, or has another basis; it is as it was then.
        TypeError: a module cannot be adapted, or not by adapters that are stored as R.
    """

    def __init__(self, model: nn.Module, footing: Footing, rank: int | None = None) -> None:
        self._model, self._footing = model, footing
        self._policy = AdapterBasis(POOL, footing.recipe, footing.check, footing.tol, footing.basis_file)
        self._added: set[str] = set()
        self.layers: list[LoraXSLinear] = []
        self._hook = model.register_state_dict_post_hook(_leave_pool_out)
        try:
            self._place()
            self._stand()
            if rank is not None:
                self._resize(rank)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Make the model what it was. The bases of layers that it had before may have grown."""
        for layer in self.layers:
            if layer.key in self._added:
                self._model.set_submodule(layer.key, layer.base_layer)
            elif POOL in layer.loraxs_R:
                layer.delete_adapter(POOL)
        self.layers.clear()
        self._added.clear()
        self._hook.remove()

    def _place(self) -> None:
        modules, ranks = dict(self._model.named_modules()), self._footing.ranks
        missing = [key for key in ranks if key not in modules]
        if not ranks:
            raise ValueError(f"source: expected adapters of some modules of {type(self._model).__name__}, got none")
        if missing:
            raise ValueError(
                f"model: expected the {len(ranks)} modules that the adapters change, got "
                f"{type(self._model).__name__} without {len(missing)} of them, such as {missing[0]!r}"
            )
        shared = next((key for key, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)), None)
        if shared is not None:
            raise ValueError(
                f"model: expected adapters that are R alone, got {shared} saved with one of them (modules_to_save or "
                f"trainable_token_indices), which every row would share"
            )
        quantization = quantization_options(self._model)
        for key, module in modules.items():
            if key not in ranks:
                continue
            if isinstance(module, LoraXSLayer):
                layer = self._check_known(module)
            else:
                layer = layer_class(module, key, quantization)(
                    module, key, POOL, quantization, r=1, lora_alpha=1, policy=self._policy, init_weights="zeros"
                )
                layer.set_adapter([])
                self._added.add(key)
                # Its parts only: LoraXSLayer.train would settle the layers one by one.
                layer.training = module.training
                self._model.set_submodule(key, layer)
            self.layers.append(layer)
            self._use(layer, ranks[key])
        share_projections(self._model)
        guard_packed_weights(self._model)

    def _check_known(self, layer: LoraXSLayer) -> LoraXSLinear:
        if not isinstance(layer, LoraXSLinear) or isinstance(layer, ParamWrapper):
            raise TypeError(
                f"model: {layer.key}: expected a module whose rows may have adapters of their own, got the parameter "
                f"{layer.parameter_name!r}, which a mixed batch shares"
            )
        if POOL in layer.loraxs_R:
            raise ValueError(f"model: {layer.key}: expected a model without a pool, got one that has it already")
        for name, policy in layer.basis_policy.items():
            if isinstance(policy, AdapterBasis) and policy.recipe != self._footing.recipe:
                raise ValueError(
                    f"model: {layer.key}: expected the basis of {self._footing.recipe}, got adapter {name!r} on that "
                    f"of {policy.recipe}, and a layer has one basis"
                )
        return layer

    def _use(self, layer: LoraXSLinear, rank: int) -> None:
        """Give the layer the adapter `POOL` of this rank, whose basis is not settled yet."""
        with _flags_kept(layer):
            layer.update_layer(POOL, rank, rank, policy=self._policy, init_weights="zeros", inference_mode=True)
        layer.loraxs_R[POOL].requires_grad_(False)
        self._policy.layers.add(layer)

    def _stand(self) -> None:
        """Compute the bases, compare them with the sketches, and turn them into those of the adapters."""
        sketches = self._footing.sketches
        known = [layer for layer in self.layers if layer.key in sketches]
        for layer in known:
            core, sketch = layer.loraxs_R[POOL], sketches[layer.key]
            assert isinstance(core, CoreMatrix)
            if core.sketch.shape != sketch.shape:
                raise ValueError(
                    f"source: {layer.key}: expected a rank of at most {core.rank} in a layer of {layer.in_features} × "
                    f"{layer.out_features}, got {sketch.shape[-1]}"
                )
            # What becomes of an R whose entries are all 1 becomes of every R.
            core.place(torch.ones_like(core.matrix()))
            core.sketch.copy_(sketch)
        self._policy.settle()
        for layer in known:
            self._turn(layer)

    def _turn(self, layer: LoraXSLinear) -> None:
        """Flip the singular vectors of the layer where they differ in sign, so that every stored R fits as it is."""
        became = layer.core(POOL).matrix().detach()
        signs = became[0]
        if not torch.equal(became, signs[:, None] * signs) or not torch.equal(signs.abs(), torch.ones_like(signs)):
            raise ValueError(
                f"model: {layer.key}: expected the basis of the stored adapters, got one that other adapters of the "
                f"model stand on and that is not theirs; load a model without adapters"
            )
        if (signs == signs[0]).all():
            return
        if len(layer.loraxs_R) > 1:
            raise ValueError(
                f"model: {layer.key}: expected singular vectors with the signs of the stored adapters, got others, "
                f"which other adapters of the model stand on; load a model without adapters"
            )
        a, bt = layer.basis_rows(layer.r[POOL])
        layer.set_basis(a * signs[:, None].to(a), bt * signs[:, None].to(bt))

    def _resize(self, rank: int) -> None:
        """Make room for another rank; the rows of the basis that are there stay what they are."""
        for layer in self.layers:
            self._use(layer, rank)
        self._policy.settle()


def _leave_pool_out(model: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Name the weights of a model as if it had no pool."""
    # Told from the layers alone, because a copy of the model has this hook too. A PEFT model's own have more adapters.
    added = {
        f"{prefix}{name}."
        for name, module in model.named_modules()
        if isinstance(module, LoraXSLayer) and list(module.loraxs_R) == [POOL]
    }
    entries = list(state.items())
    state.clear()
    for name, value in entries:
        layer = next((begin for begin in _beginnings(name) if begin in added), None)
        if layer is not None:
            own = name[len(layer) :]
            if not own.startswith("base_layer."):
                continue
            name = layer + own.removeprefix("base_layer.")
        elif f".loraxs_R.{POOL}." in name:
            continue
        state[name] = value


def _beginnings(name: str) -> Iterator[str]:
    """The modules that a weight is in, by name."""
    parts = name.split(".")
    return (".".join(parts[:i]) + "." for i in range(1, len(parts)))


@contextmanager
def _flags_kept(layer: LoraXSLinear) -> Iterator[None]:
    """Adding an adapter decides anew which of the others are trained; here it must not."""
    before = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    yield
    for parameter, flag in before:
        parameter.requires_grad_(flag)


def other_layers(model: nn.Module, layers: Sequence[LoraXSLayer]) -> list[LoraXSLayer]:
    """The LoRA-XS layers of the model that are not among `layers`."""
    mine = {id(layer) for layer in layers}
    return [module for module in model.modules() if isinstance(module, LoraXSLayer) and id(module) not in mine]
