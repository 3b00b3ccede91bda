"""adapter_names: one batch, another adapter in every row, through PEFT's own forward and generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from loraxs_ext.layers import BASE, LoraXSLayer, routed

# Arguments of forward and generate whose first dimension is the batch.
_BATCHED = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "pixel_values", "attention_mask")


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Serve row i of the batch with the adapter names[i] (`__base__`: with none) inside the context.

    Args:
        model: the model with the layers.
        names: one name per row of the input, before generate() repeats rows for beams or returned sequences.
        args, kwargs: arguments of the forward or generate call, as far as the caller knows them.

    Raises:
        ValueError: training mode, an unknown adapter, a merged layer, or a batch of another size.
    """
    with ExitStack() as stack:
        stack.enter_context(route_rows(model, names))
        if not check_rows(len(names), args, kwargs):
            # PEFT's task models keep the input to themselves; the model below sees it.
            check = partial(_check_rows_hook, rows=len(names))
            stack.callback(model.register_forward_pre_hook(check, with_kwargs=True).remove)
        yield


@contextmanager
def route_rows(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """`mixed_batch` without a look at the batch itself."""
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in model.modules() if isinstance(module, LoraXSLayer)]
    unknown = set(names) - {BASE}.union(*(layer.loraxs_R for layer in layers))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = partial(_add_names_hook, names=names)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(routed(layers, names))
        yield


def check_rows(rows: int, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments of forward or generate tell the size of the batch; ValueError if it is not `rows`."""
    for value in (*args[:1], *(kwargs.get(key) for key in _BATCHED)):
        if isinstance(value, Tensor) and value.ndim:
            if len(value) != rows:
                raise ValueError(
                    f"adapters: expected one name per row of the batch, got {rows} names for {len(value)} rows"
                )
            return True
    return False


def _check_rows_hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], rows: int) -> None:
    check_rows(rows, args, kwargs)


def _add_names_hook(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple, dict[str, Any]]:
    """PEFT's wrapper of modules_to_save wants a name for every row it sees, so repeat them over beams."""
    repeats = max(len(args[0]) // len(names), 1) if args and names else 1
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}
