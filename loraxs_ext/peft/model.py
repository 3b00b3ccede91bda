"""LoraXSModel: the PEFT tuner that puts LoRA-XS layers into a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from loraxs_ext.layers import (
    LoraXSLayer,
    MergeLossWarning,
    ParamWrapper,
    TinyCore,
    TinyOptions,
    guard_packed_weights,
    pass_gradients,
    share_projections,
    tie,
)

from .bases import AdapterBasis
from .combine import combine
from .config import LoraXSConfig
from .dispatch import layer_class, quantization_options
from .gathering import adapter_entries, bias_entries, gather_trained, plain_name
from .mixed import mixed_batch
from .register import PREFIX
from .swapping import settle_scaling
from .tying import share_core, tie_targets
from .weights import combined_fingerprint

_FROZEN_BUFFERS = ("loraxs_A", "loraxs_Bt", "loraxs_R", "loraxs_norms")


class LoraXSModel(BaseTuner):
    """Puts LoRA-XS layers in the place of the targets; see `peft.tuners.BaseTuner` for the arguments.

    All bases of an adapter are computed after the injection in one batch, or taken from the cache on disk.
    """

    prefix = PREFIX
    tuner_layer_cls = LoraXSLayer
    target_module_mapping = cast(dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter, then compute the bases it needs."""
        config = cast(LoraXSConfig, self.peft_config[adapter_name])
        options = (config.recipe(), config.basis_check, config.basis_tol, config.basis_file, config)
        self._policy = AdapterBasis(adapter_name, *options)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.use_tinylora:
            cores = [cast(TinyCore, layer.core(adapter_name)) for layer in self._policy.layers]
            tie(sorted(cores, key=lambda core: int(core.seed)), config.weight_tying)
        share_projections(model)
        guard_packed_weights(model)
        pass_gradients(model)
        if config.fan_in_fan_out and not all(layer.fan_in_fan_out for layer in self._policy.layers):
            warnings.warn(
                "fan_in_fan_out: expected False for torch.nn.Linear layers, got True; the layout of each layer's own "
                "type is used.",
                stacklevel=2,
            )
        # A loaded configuration that keeps its basis brings it along with R.
        if not (config.save_basis and config.base_fingerprint):
            self._policy.settle()
        # DistributedDataParallel would broadcast every buffer before every step; these never change.
        ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *_frozen_buffer_names(model)}
        cast(Any, model)._ddp_params_and_buffers_to_ignore = sorted(ignored)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        mine = cast(LoraXSConfig, config)
        for name, other in cast(dict[str, LoraXSConfig], self.peft_config).items():
            theirs = set(other.target_parameters or ())
            if mine.target_parameters and theirs and set(mine.target_parameters) != theirs:
                raise ValueError(
                    f"target_parameters: expected those of adapter {name!r}, {sorted(theirs)}, because the names in a "
                    f"checkpoint depend on them all, got {sorted(mine.target_parameters)}"
                )
        recipe = mine.recipe()
        for layer in _layers(self.model):
            for name, policy in layer.basis_policy.items():
                if isinstance(policy, AdapterBasis) and policy.recipe != recipe:
                    raise ValueError(
                        f"recipe: expected that of adapter {name!r}, {policy.recipe}, because all adapters of a model "
                        f"share one basis, got {recipe}"
                    )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(LoraXSConfig, peft_config)
        ranks, alphas = config.rank_pattern, config.alpha_pattern
        options: dict[str, Any] = {
            "r": ranks.get(get_pattern_key(list(ranks), current_key), config.r),
            "lora_alpha": alphas.get(get_pattern_key(list(alphas), current_key), config.lora_alpha),
            "policy": self._policy,
            "use_rslora": config.use_rslora,
            "dropout": config.loraxs_dropout,
            "init_weights": config.init_weights,
            "init_std": config.init_std,
            "init_seed": config.init_seed,
            "keep_basis": config.save_basis,
            "tiny": self._tiny_options(config),
            "inference_mode": config.inference_mode,
            "magnitude": config.edora_norm if config.use_edora else None,
        }
        layer: LoraXSLayer
        wrapped = target.parameter_name if isinstance(target, ParamWrapper) else None
        if isinstance(target, LoraXSLayer) and wrapped == parameter_name:
            layer = target
            layer.update_layer(adapter_name, **options)
        else:
            quantization = quantization_options(self.model)
            if parameter_name is None:
                kind = layer_class(target, current_key, quantization)
                layer = kind(target, current_key, adapter_name, quantization, **options)
            else:
                layer = ParamWrapper(target, current_key, adapter_name, parameter_name, **options)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            # Not _replace_module: it would move R to the device of the weight, which is "meta" for an offloaded one.
            setattr(parent, target_name, layer)
        if current_key in config.target_modules_to_tie:
            share_core(layer, self.model, adapter_name)
        self._policy.layers.add(layer)

    def _tiny_options(self, config: LoraXSConfig) -> TinyOptions | None:
        """Of the next layer of the adapter that is being injected."""
        if not config.use_tinylora:
            return None
        seed = config.projection_seed + len(self._policy.layers)
        return TinyOptions(config.u, seed, config.init_v_bound, config.save_projection)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(LoraXSConfig, peft_config)
        if config.target_modules is None and config.target_parameters:
            if self.target_module_mapping.get(model_config["model_type"]) is None:
                return config
        return super()._prepare_adapter_config(config, model_config)

    def _add_targets_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        tie_targets(cast(LoraXSConfig, peft_config), self.model, tied_weight_keys)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Serve row i of the batch with the adapter adapter_names[i]; PEFT calls this around forward and generate."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        with mixed_batch(self.model, names, args, kwargs):
            yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Unloading puts back what is there already. PEFT's version also wants a weight of it, which a head of several
        # layers has not.
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into the base weights, keeping them; see `LoraXSLinear.merge`."""
        with _one_merge_warning():
            super().merge_adapter(adapter_names, safe_merge)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        # All of them before the first is merged.
        for layer in _layers(self.model):
            layer.check_mergeable()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        with _one_merge_warning():
            return super()._unload_and_optionally_merge(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter.

        Raises:
            RuntimeError: it serves rows of an `adapters` context that is open; nothing is removed then.
            ValueError: there is no such adapter.
        """
        if any(layer.route is not None and adapter_name in layer.route.names for layer in _layers(self.model)):
            raise RuntimeError(
                f"adapter_name: expected an adapter that no open adapters() context serves, got {adapter_name!r}; "
                f"leave the context before you delete it"
            )
        super().delete_adapter(adapter_name)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter Σ wᵢ·sᵢ·B Rᵢ A: exact, because all adapters share B and A.

        Args:
            adapters: names of existing adapters; their ranks, alphas and targets may differ.
            weights: one factor per adapter.
            adapter_name: name of the new adapter; nothing happens if it exists, as in LoRA.
            combination_type: "linear", "svd" or "cat"; LoRA's three ways to a sum, which are one here.

        Raises:
            ValueError: an adapter does not exist or has a magnitude, or the arguments do not fit each other.
        """
        combine(self, adapters, weights, adapter_name, combination_type)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        return [f"base_model.model.{name}" for name in _frozen_buffer_names(self.model)]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT writes the configuration after this: the last moment to note which base the adapter belongs to. A loaded
        # adapter with a basis of its own belongs to the base it came from.
        saved = cast(LoraXSConfig, config)
        settle_scaling(saved, [layer for layer in _layers(model) if adapter_name in layer.loraxs_R], adapter_name)
        if not (saved.save_basis and saved.base_fingerprint):
            layers = [site for m in _layers(model) if adapter_name in m.loraxs_R for site in m.sites]
            saved.base_fingerprint = combined_fingerprint(layers) or saved.base_fingerprint
        kept = {**adapter_entries(state_dict, adapter_name), **bias_entries(model, state_dict, saved.bias)}
        # PEFT takes more from `state_dict`, a copy of its own: modules that are trained completely, and the whole
        # weight of an embedding that is a target, which is not wanted.
        gather_trained(model, state_dict, kept)
        for name, module in model.named_modules():
            if isinstance(module, LoraXSLayer):
                state_dict.pop(f"{plain_name(name)}.base_layer.weight", None)
        return {name: state_dict[name] for name in kept}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # Before a single tensor is loaded; a self-contained file brings its own basis instead.
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraXSLayer) and adapter_name in m.loraxs_R}
        if layers and not cast(LoraXSConfig, config).save_basis:
            sketches: dict[str, Tensor] = {}
            for name, layer in layers.items():
                stored = remapped.get(f"{name}.loraxs_R.{adapter_name}.sketch")
                if stored is not None:
                    parts = (stored,) if layer.num_experts is None else stored
                    sketches |= {site.key: part for site, part in zip(layer.sites, parts, strict=False)}
            policy = cast(AdapterBasis, next(iter(layers.values())).basis_policy[adapter_name])
            policy.refuse_wrong_base(sketches)
        return remapped


def _layers(model: nn.Module) -> list[LoraXSLayer]:
    return [module for module in model.modules() if isinstance(module, LoraXSLayer)]


def _frozen_buffer_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_buffers() if any(part in name for part in _FROZEN_BUFFERS)]


@contextmanager
def _one_merge_warning() -> Iterator[None]:
    """Fold the layers' `MergeLossWarning`s into one that names the worst; other warnings pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    losses = [w.message for w in caught if isinstance(w.message, MergeLossWarning)]
    for warning in caught:
        if not isinstance(warning.message, MergeLossWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if losses:
        warnings.warn(max(losses, key=lambda message: message.loss), stacklevel=3)
