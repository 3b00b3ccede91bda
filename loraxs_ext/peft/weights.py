"""The weights behind the layers: read from wherever they are kept, hashed, and decomposed in one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial

from peft.tuners.tuners_utils import onload_layer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor
from transformers.integrations.fsdp import is_fsdp_enabled as only_first_process_has_weights

from loraxs_ext import basis
from loraxs_ext.basis import Factors, Recipe
from loraxs_ext.basis.distributed import active_group, gather, is_sharded
from loraxs_ext.layers import LoraXSLayer

from .verify import current_factors


def compute_bases(layers: Sequence[LoraXSLayer], ranks: Mapping[str, int], recipe: Recipe) -> dict[str, Factors]:
    """Give each layer a basis of at least ranks[layer.key] rows: all new ones in one batch, rows already there kept.

    Layers that share one weight share one basis. Within `loraxs_ext.basis.across_ranks`, the processes share the work.

    Returns:
        By layer key, the factors of the bases that are new, before they are rounded to the dtype of the layer.
    """
    by_weight: dict[Hashable, list[LoraXSLayer]] = {}
    for layer in layers:
        if layer.basis_rank < ranks[layer.key]:
            by_weight.setdefault(layer.weight_id, []).append(layer)
    new: dict[str, tuple[LoraXSLayer, list[LoraXSLayer], int]] = {}
    grown: dict[str, tuple[LoraXSLayer, list[LoraXSLayer], int]] = {}
    for group in by_weight.values():
        rank = max(ranks[layer.key] for layer in group)
        owner = max(group, key=lambda layer: layer.basis_rank)
        (grown if owner.basis_rank else new)[owner.key] = (owner, group, rank)
    factors = {}
    if new:
        factors = _decompose({key: (owner, rank) for key, (owner, _, rank) in new.items()}, recipe)
    for key, (owner, _, rank) in grown.items():
        factors[key] = basis.extend(current_factors(owner, owner.basis_rank), load_weight(owner), rank, recipe)
    by_layer = {}
    for key, (owner, group, _) in {**new, **grown}.items():
        owner.set_basis(factors[key].a, factors[key].bt)
        for layer in group:
            layer.share_basis(owner)
            layer.base_fingerprint = layer.base_fingerprint or factors[key].fingerprint
            by_layer[layer.key] = factors[key]
    return by_layer


def _decompose(wanted: Mapping[str, tuple[LoraXSLayer, int]], recipe: Recipe) -> dict[str, Factors]:
    ranks = {key: rank for key, (_, rank) in wanted.items()}
    weights: dict[str, Tensor | Callable[[], Tensor]] = {key: partial(load_weight, m) for key, (m, _) in wanted.items()}
    group = active_group()
    if only_first_process_has_weights():
        raise RuntimeError(
            "fsdp_cpu_ram_efficient_loading: expected false (FSDP_CPU_RAM_EFFICIENT_LOADING), because every process "
            "reads the weights when an adapter is added, got true, which leaves them on the first process only"
        )
    if group is None:
        return basis.decompose(weights, ranks, recipe, cache_dir="default")
    for key, (layer, _) in wanted.items():
        if any(hasattr(parameter, "ds_id") for parameter in layer.get_base_layer().parameters()):
            raise ValueError(
                f"{key}: base_layer: expected a weight that one process can read, got one that DeepSpeed partitions; "
                f"leave across_ranks, and every process will gather and decompose the weights itself"
            )
        if is_sharded(getattr(layer.get_base_layer(), "weight", None)):
            weights[key] = layer.frozen_weight()
    shapes = {key: (layer.out_features, layer.in_features) for key, (layer, _) in wanted.items()}
    return basis.decompose_across(weights, ranks, recipe, shapes=shapes, group=group, cache_dir="default")


def combined_fingerprint(layers: Iterable[LoraXSLayer]) -> str | None:
    """64 bits of the weights of all `layers` in hex; None if there are none, or one waits on the meta device, or one is
    sharded: reading it takes all processes, and an adapter may well be saved by one.

    Each layer is hashed once, when its basis is computed or when this is first asked for.
    """
    parts = []
    for layer in sorted(layers, key=lambda layer: layer.key):
        if layer.base_fingerprint is None:
            base = layer.get_base_layer()
            if layer.get_base_layer_device().type == "meta" or is_sharded(getattr(base, layer.parameter_name, None)):
                return None
            layer.base_fingerprint = basis.fingerprint(load_weight(layer))
        parts.append((layer.key, layer.base_fingerprint))
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest() if parts else None


def load_weight(layer: LoraXSLayer) -> Tensor:
    """W [N, K] from wherever offloading or sharding keeps it; collective for a weight that is sharded."""
    with onload_layer(layer.module), gather_params_ctx(list(layer.get_base_layer().parameters())):
        weight = layer.frozen_weight().detach()
    if is_sharded(weight):
        weight = gather(weight)
    if layer.quantization_backend is not None and layer.base_fingerprint is None:
        # While it can be read: some quantised weights are repacked when they are first used.
        layer.base_fingerprint = basis.fingerprint(weight)
    return weight
