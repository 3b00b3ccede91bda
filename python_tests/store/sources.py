"""A source of rows in memory that can be slow, change and fail."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import torch

from loraxs_ext.store import AdapterRow, RowLayout, Segment

LAYOUT = RowLayout([Segment("q", 3), Segment("k", 2)])


class MemorySource:
    """Any adapter is there, at version 1 until `replace`; its numbers say which it is.

    Attributes:
        loads: how often each adapter's row was asked for.
        before_row: called with the name before a row is given, outside the source's lock.
    """

    def __init__(self, layout: RowLayout = LAYOUT) -> None:
        self.layout = layout
        self.loads: Counter[str] = Counter()
        self.before_row: Callable[[str], None] = lambda name: None
        self._versions: dict[str, int] = {}
        self._lock = threading.Lock()

    def replace(self, name: str) -> None:
        with self._lock:
            self._versions[name] = self._versions.get(name, 1) + 1

    def version(self, name: str) -> int:
        if name.startswith("unknown"):
            raise KeyError(name)
        with self._lock:
            return self._versions.get(name, 1)

    def row(self, name: str) -> AdapterRow:
        self.before_row(name)
        with self._lock:
            self.loads[name] += 1
            version = self._versions.get(name, 1)
        return AdapterRow(name, version, self.layout, self.numbers(name, version))

    def numbers(self, name: str, version: int = 1) -> torch.Tensor:
        """[layout.size] fp32, small whole numbers: exact in every dtype."""
        generator = torch.Generator().manual_seed(hash_of(name) + version)
        return torch.randint(-100, 100, (self.layout.size,), generator=generator).float()


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode()[-6:], "big")
