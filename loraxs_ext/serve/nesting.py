"""The contexts that are open in one model: one inside the other, all of one task."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from loraxs_ext.layers import LoraXSLayer, Route, following


class _Open(NamedTuple):
    routes: Mapping[LoraXSLayer, Route]
    task: asyncio.Task[Any] | None


class Nesting:
    """Used by one thread at a time. Tasks and generators of that thread could open and leave contexts in any order."""

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self._tangled = False

    def check_task(self) -> None:
        """Raise RuntimeError if another task is inside: the two would be served with each other's adapters."""
        if self._open and self._open[-1].task not in (None, _task()):
            raise RuntimeError(
                "adapters: expected contexts one inside the other, got one while another task of this thread is inside "
                "its own; let one thread compute, or put a lock around the context"
            )

    @contextmanager
    def following(self, routes: Mapping[LoraXSLayer, Route]) -> Iterator[None]:
        """As `layers.following`.

        Raises:
            RuntimeError: at the end, a context is left before the one that was entered inside it, which goes on as it
                was. In the end, no layer keeps a route.
        """
        mine = _Open(routes, _task())
        self._open.append(mine)
        try:
            with following(routes):
                yield
        finally:
            innermost = self._open[-1] is mine
            self._open = [one for one in self._open if one is not mine]
            if not innermost or self._tangled:
                inner = self._open[-1].routes if self._open else {}
                for layer in routes:
                    layer.route = route = inner.get(layer)
                    layer.fused = None if route is None or layer.disable_adapters else route.fused
                self._tangled = bool(self._open)
            if not innermost:
                raise RuntimeError("adapters: expected the innermost context to be left first, got one around another")


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
