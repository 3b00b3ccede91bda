"""`loraxs_ext.adapters`: another adapter for every row of a batch, in forward and generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from loraxs_ext.layers import BASE, LoraXSLayer
from loraxs_ext.peft.mixed import route_rows

from .models import transformers_model
from .pool import check_names, pool_of
from .rows import one_adapter_a_row


@contextmanager
def adapters(model: nn.Module, names: Sequence[str | None], *, timeout: float | None = None) -> Iterator[None]:
    """Serve row i of every forward and generate call inside the context with the adapter names[i].

    In a model with an `AdapterPool`, names are those of its source. They are looked up on entry: an adapter that is
    replaced meanwhile stays as it was for this context. In a PEFT model without a pool, they are those of its LoRA-XS
    adapters. generate() may repeat rows, for beams or returned sequences.

    Contexts may be nested, in one thread: the innermost counts, and the outer ones keep their slots. See `AdapterPool`
    for threads.

    Args:
        model: a transformers model with a pool, or a model with LoRA-XS adapters; the PeftModel around it, or the
            compiled model, are fine as well. In eval mode.
        names: one per row of the batch; None for the base model.
        timeout: seconds to wait for slots that are all in use, or for another thread; None for ever.

    Raises:
        KeyError: the source of the pool has no such adapter.
        TimeoutError: there was no slot in time.
        ValueError: training mode, an adapter that the PEFT model does not have, no adapters at all; or, by the call, a
            batch of another size.
    """
    check_names(names)
    base = transformers_model(model)
    pool = pool_of(base)
    if pool is not None:
        with pool.adapters(names, timeout):
            yield
        return
    layers = [module for module in base.modules() if isinstance(module, LoraXSLayer)]
    if not layers:
        raise ValueError(
            f"model: expected one with an AdapterPool or with LoRA-XS adapters, got {type(base).__name__} without"
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("model: expected adapters that are not disabled, got some; leave disable_adapter() first")
    with route_rows(base, [BASE if name is None else name for name in names]), one_adapter_a_row(base, layers):
        yield
