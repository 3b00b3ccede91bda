"""One adapter as it travels: its numbers in one row, and what they belong to."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from .layout import RowLayout


class AdapterRow(NamedTuple):
    """All R matrices of an adapter end to end.

    Attributes:
        name: of the adapter.
        version: grows with every replacement of the adapter.
        layout: which numbers belong to which module.
        numbers: [layout.size] in fp32, fp16, bf16, or int8 with `steps`. May be a view into memory that is only valid
            until the source is asked again; copy it to keep it.
        steps: fp32 [modules] for int8 rows, the size of one step of each module's R; None otherwise.
    """

    name: str
    version: int
    layout: RowLayout
    numbers: Tensor
    steps: Tensor | None = None


class RowSource(Protocol):
    """Where rows come from: a store, or anything that answers by name. Called from several threads.

    A source that can tell many versions sooner than one by one has `current_versions` as well, as `AdapterStore` does.
    """

    def version(self, name: str) -> int:
        """The current version of the adapter; KeyError if there is none."""
        ...

    def row(self, name: str) -> AdapterRow:
        """The adapter; KeyError if there is none."""
        ...
