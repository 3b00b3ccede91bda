"""As many adapters as rows: what forward and generate are called with inside `loraxs_ext.adapters`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, cast

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
    # Contexts inside this one find it there, and the last of them to be left takes it away.
    counting = plain if isinstance(plain, _Generate) else _Generate(model, layers)
    counting.contexts += 1
    try:
        yield
    finally:
        counting.contexts -= 1
        if not counting.contexts:
            counting.remove()


class _Generate:
    """What stands for `model.generate` as long as there are contexts."""

    def __init__(self, model: nn.Module, layers: Sequence[LoraXSLayer]) -> None:
        self._model, self._layers, self.contexts = model, layers, 0
        self._shadowed = vars(model).get("generate")
        self._plain = cast(Any, model.generate)
        update_wrapper(self, self._plain)
        model.generate = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route = self._layers[0].route
        assert route is not None
        check_rows(len(route.rows.slots), args, kwargs)
        _set_exact(self._layers, False)
        try:
            return self._plain(*args, **kwargs)
        finally:
            _set_exact(self._layers, True)

    def remove(self) -> None:
        if self._shadowed is None:
            del self._model.generate
        else:
            self._model.generate = self._shadowed


def _set_exact(layers: Sequence[LoraXSLayer], exact: bool) -> None:
    for layer in layers:
        if layer.route is not None:
            layer.route.rows.exact = exact
