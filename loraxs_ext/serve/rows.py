"""As many adapters as rows: what forward and generate are called with inside `loraxs_ext.adapters`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from loraxs_ext.layers import LoraXSLayer
from loraxs_ext.peft.mixed import check_rows


@contextmanager
def one_adapter_a_row(model: nn.Module, layers: Sequence[LoraXSLayer]) -> Iterator[None]:
    """Refuse batches of other sizes than the routes of `layers`, in forward and in generate.

    Args:
        model: the transformers model itself.
        layers: with a route each.
    """
    _set_exact(layers, True)
    plain: Any = getattr(model, "generate", None)
    if plain is None:
        yield
        return
    shadowed = vars(model).get("generate")

    @wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        route = layers[0].route
        assert route is not None
        check_rows(len(route.rows.slots), args, kwargs)
        _set_exact(layers, False)
        try:
            return plain(*args, **kwargs)
        finally:
            _set_exact(layers, True)

    model.generate = generate  # type: ignore[assignment]
    try:
        yield
    finally:
        if shadowed is None:
            del model.generate
        else:
            model.generate = shadowed


def _set_exact(layers: Sequence[LoraXSLayer], exact: bool) -> None:
    for layer in layers:
        if layer.route is not None:
            layer.route.rows.exact = exact
