"""The call of the LoRA-XS and EDoRA code: a LoRA adapter of PEFT becomes one of ours, in the same model object."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from loraxs_ext import basis
from loraxs_ext.basis import Recipe
from loraxs_ext.layers import LoraXSLayer

from .config import LoraXSConfig
from .lora_config import from_lora
from .model import LoraXSModel
from .reconstruction import Reconstruction
from .register import PEFT_TYPE
from .verify import record
from .weights import load_weight

# What the layers of PEFT already have: another value in the argument would be ignored.
_FIXED_BY_LAYERS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def find_and_initialize(
    model: nn.Module,
    peft_config: Mapping[str, Any],
    adapter_name: str,
    reconstr_type: str,
    reconstruct_config: Mapping[str, Any],
    writer: Any = None,
    sigma_val: float = 1e-5,
) -> None:
    """Turn a LoRA adapter into a LoRA-XS adapter (EDoRA for `use_dora=True`), in place; call it after get_peft_model.

    The model stays the same object and becomes a LoRA-XS model. Targets, rank, alpha, dropout and heads are those of
    the LoRA adapter; A and B are those of the reference (`svd="reference"`, with the signs of scikit-learn ≤ 1.4);
    R ~ N(0, σ²). Random numbers come from torch's global generator in the order of the reference, so a seeded script
    starts from the same R. In a model that has LoRA-XS adapters already, one more is added. With `r_squared: False`
    the adapter stays PEFT's LoRA, with B = U and A ~ N(0, σ²), both trained.

    Args:
        model: PeftModel with the LoRA adapter.
        peft_config: LoraConfig by adapter name.
        adapter_name: any name.
        reconstr_type: "svd".
        reconstruct_config: the options of the reference's YAML file; see `Reconstruction`.
        writer: not used, as in the reference.
        sigma_val: σ.

    Raises:
        ValueError or TypeError: an argument or an option does not fit; the model is as it was then.

    Source: Bałazy et al., "LoRA-XS", and Nasiri and Garraghan, "EDoRA"; where the two differ, σ is an argument.
    """
    if reconstr_type != "svd":
        raise ValueError(f"reconstr_type: expected 'svd', got {reconstr_type!r}")
    reconstruction = Reconstruction.from_dict(reconstruct_config)
    if not isinstance(model, PeftModel):
        raise TypeError(f"model: expected a PeftModel, got {type(model).__name__}; call get_peft_model first")
    lora = _lora_config(model, peft_config, adapter_name)
    if reconstruction.rank not in (None, lora.r):
        raise ValueError(
            f"reconstruct_config['svd']['rank']: expected the r of the adapter, {lora.r}, got {reconstruction.rank}"
        )
    if not reconstruction.r_squared:
        _initialize_lora(model, adapter_name, reconstruction, sigma_val)
        return
    config = from_lora(
        lora.to_dict(), **reconstruction.recipe_fields, init_std=sigma_val, save_basis=reconstruction.draws_basis
    )
    if model.peft_type == PeftType.LORA:
        _become_loraxs(model, adapter_name, config)
    elif reconstruction.draws_basis:
        raise ValueError(
            "reconstruct_config: expected neither half_init_dec nor replacement_module_random_init for a further "
            "adapter, because all adapters of a model share one basis"
        )
    else:
        model.add_adapter(adapter_name, config)
    _draw(model, adapter_name, reconstruction, sigma_val)


def _lora_config(model: PeftModel, peft_config: Mapping[str, Any], adapter: str) -> LoraConfig:
    """The configuration to follow: that of the model where it has the adapter."""
    if adapter not in peft_config:
        raise ValueError(f"peft_config: expected the configuration of {adapter!r}, got those of {list(peft_config)}")
    asked = peft_config[adapter]
    if not isinstance(asked, LoraConfig):
        raise TypeError(f"peft_config[{adapter!r}]: expected a LoraConfig, got {type(asked).__name__}")
    if model.peft_type == PEFT_TYPE:
        if adapter in model.peft_config:
            raise ValueError(f"adapter_name: expected a LoRA adapter, got {adapter!r}, which is LoRA-XS already")
        return asked
    if model.peft_type != PeftType.LORA or adapter not in model.peft_config:
        raise ValueError(
            f"adapter_name: expected a LoRA adapter of the model, got {adapter!r}; the model has {model.peft_type} "
            f"with the adapters {list(model.peft_config)}"
        )
    made = cast(LoraConfig, model.peft_config[adapter])
    for name in _FIXED_BY_LAYERS:
        if getattr(asked, name) != getattr(made, name):
            raise ValueError(
                f"peft_config[{adapter!r}]: expected the configuration the model was made with, {name}="
                f"{getattr(made, name)!r}, got {name}={getattr(asked, name)!r}"
            )
    return made


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The outermost LoRA layers by name."""
    found: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _become_loraxs(model: PeftModel, adapter: str, config: LoraXSConfig) -> None:
    others = [name for name in model.peft_config if name != adapter]
    if others:
        raise ValueError(
            f"adapter_name: expected the only adapter of the model, got {adapter!r} beside {others}. Add the others "
            f"afterwards, each by a call of find_and_initialize with its LoraConfig"
        )
    base = cast(nn.Module, model.base_model.model)
    layers = _lora_layers(base)
    if any(cast(Any, layer).merged for layer in layers.values()):
        raise ValueError(f"adapter_name: expected an adapter that is not merged, got {adapter!r}; call unmerge_adapter")
    with _without_lora(base, layers):
        tuner = LoraXSModel(base, {adapter: config}, adapter)
    for name, layer in layers.items():
        base.get_submodule(name).train(cast(nn.Module, layer).training)
    model.base_model, model.peft_type = tuner, PEFT_TYPE


@contextmanager
def _without_lora(base: nn.Module, layers: Mapping[str, LoraLayer]) -> Iterator[None]:
    """Take the LoRA layers out of `base`; back to where they were if the body fails."""
    configs: Any = base.__dict__.pop("peft_config")
    for name, layer in layers.items():
        base.set_submodule(name, layer.base_layer)
    try:
        yield
    except BaseException:
        for name, layer in layers.items():
            base.set_submodule(name, cast(nn.Module, layer))
        cast(Any, base).peft_config = configs
        raise


@torch.no_grad()
def _draw(model: nn.Module, adapter: str, reconstruction: Reconstruction, std: float) -> None:
    """R of every layer, and what of its basis is random."""
    for layer in model.modules():
        if not isinstance(layer, LoraXSLayer) or adapter not in layer.r:
            continue
        rank = layer.r[adapter]
        if reconstruction.draws_basis:
            layer.set_basis(*_randomized(*layer.basis_rows(rank), reconstruction))
            record(layer, adapter)
        # Made as the reference makes it: its constructor takes r² numbers from the generator, too.
        drawn = nn.Linear(rank, rank, bias=False)
        nn.init.normal_(drawn.weight, std=std)
        layer.core(adapter).place(drawn.weight)


def _randomized(a: Tensor, bt: Tensor, reconstruction: Reconstruction) -> tuple[Tensor, Tensor]:
    """a [r, K] and bt [r, N] with what is random drawn anew, by Kaiming's rule with slope √5: U(±1/√fan_in)."""
    # scikit-learn's components lie column by column in memory, and the generator fills memory in order.
    bt = bt.mT.contiguous().mT
    if reconstruction.half_init_dec and len(bt) > 1:
        nn.init.kaiming_uniform_(bt[math.ceil(len(bt) / 2) :], a=math.sqrt(5))
    if reconstruction.replacement_module_random_init:
        # The reference holds A transposed here, so its fan-in is r.
        a = nn.init.kaiming_uniform_(a.mT.contiguous(), a=math.sqrt(5)).mT
        nn.init.kaiming_uniform_(bt, a=math.sqrt(5))
    return a, bt


@torch.no_grad()
def _initialize_lora(model: PeftModel, adapter: str, reconstruction: Reconstruction, std: float) -> None:
    """B = U and A ~ N(0, σ²) in PEFT's own layers."""
    if model.peft_type != PeftType.LORA:
        raise ValueError(
            "reconstruct_config['r_squared']: expected True in a model of LoRA-XS adapters, got False, which is LoRA"
        )
    layers = {name: cast(Any, layer) for name, layer in _lora_layers(model.get_base_model()).items()}
    layers = {name: layer for name, layer in layers.items() if adapter in layer.r}
    foreign = [f"{name} ({type(m).__name__})" for name, m in layers.items() if adapter not in m.lora_A]
    if foreign:
        raise TypeError(f"target_modules: expected linear layers, got {foreign}")
    quantization = get_quantization_kwargs(model.base_model)
    weights = {
        name: partial(load_weight, LoraXSLayer(layer.base_layer, name, **quantization))
        for name, layer in layers.items()
    }
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    recipe = Recipe(
        svd="reference",
        sklearn_n_iter=reconstruction.n_iter,
        sklearn_random_state=reconstruction.random_state,
    )
    for name, factors in basis.decompose(weights, ranks, recipe, cache_dir="default").items():
        _, bt = _randomized(factors.a, factors.bt, reconstruction)
        layers[name].lora_B[adapter].weight.copy_(bt.mT)
        nn.init.normal_(layers[name].lora_A[adapter].weight, std=std)
