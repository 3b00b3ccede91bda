"""Batches that mix adapters: which rows come together, and which slot each belongs to."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import ceil
from typing import Any

import torch
from torch.utils.data import Sampler

from loraxs_ext.layers import seeded_generator


class SlotCollator:
    """Makes a batch of rows that name their adapter: `slots` int64 [rows] beside what `collate` makes of the rest.

    Args:
        slot_of: slot by name, `ManyAdapters.slot_of`.
        collate: makes a batch of rows without that column.
        column: holds an adapter's name, or its slot.

    Raises:
        ValueError: when called, an adapter is unknown.
    """

    def __init__(
        self, slot_of: Mapping[str, int], collate: Callable[[list[dict[str, Any]]], Any], column: str = "adapter"
    ) -> None:
        self.slot_of, self.collate, self.column = slot_of, collate, column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rest = [{key: value for key, value in row.items() if key != self.column} for row in examples]
        slots = slots_of((row[self.column] for row in examples), self.slot_of, self.column)
        return {**self.collate(rest), "slots": torch.tensor(slots, dtype=torch.int64)}


class AdapterBatches(Sampler[list[int]]):
    """Batches of a few rows from each of several adapters; each adapter's rows in an order of its own.

    What an adapter meets, and in which order, depends on its own rows, its name and the seed alone: as if it were
    trained alone with batches of `rows_per_adapter`. Those with the most rows left come first, so that batches stay
    full as long as possible.

    Args:
        adapters: name or slot of every row of the data.
        rows_per_adapter: rows that an adapter has in a batch, less at the end of its epoch.
        adapters_per_batch: how many adapters come together, less at the end of the epoch.
        seed: of the orders.
        rows_per_epoch: rows that every adapter takes in an epoch, going around its data, so that all take the same
            number; None for each row once.

    Raises:
        ValueError: a number is not positive, or there are no rows.
    """

    def __init__(
        self,
        adapters: Iterable[str | int],
        rows_per_adapter: int,
        adapters_per_batch: int,
        *,
        seed: int = 0,
        rows_per_epoch: int | None = None,
    ) -> None:
        numbers = {"rows_per_adapter": rows_per_adapter, "adapters_per_batch": adapters_per_batch}
        for name, value in {**numbers, "rows_per_epoch": rows_per_epoch or 1}.items():
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.rows_of: dict[str | int, list[int]] = {}
        for row, adapter in enumerate(adapters):
            self.rows_of.setdefault(adapter, []).append(row)
        if not self.rows_of:
            raise ValueError("adapters: expected at least one row, got none")
        self.rows_per_adapter, self.rows_per_epoch = rows_per_adapter, rows_per_epoch
        self.seed, self.epoch = seed, 0
        turns = {name: ceil((rows_per_epoch or len(rows)) / rows_per_adapter) for name, rows in self.rows_of.items()}
        self.plan = _plan(turns, adapters_per_batch)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next, from 0: each has orders of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        parts = {adapter: self._parts(adapter) for adapter in self.rows_of}
        for batch in self.plan:
            yield [row for adapter in batch for row in next(parts[adapter])]

    def own_steps(self, steps: int, accumulate: int = 1) -> dict[str | int, int]:
        """How many of the first `steps` steps each adapter takes part in, `accumulate` batches to a step."""
        made = dict.fromkeys(self.rows_of, 0)
        starts = range(0, len(self), accumulate)
        per_epoch = [{a for batch in self.plan[i : i + accumulate] for a in batch} for i in starts]
        for present, times in zip(per_epoch, _shares(steps, len(per_epoch)), strict=True):
            for adapter in present:
                made[adapter] += times
        return made

    def _parts(self, adapter: str | int) -> Iterator[list[int]]:
        """The rows of the adapter in this epoch, `rows_per_adapter` at a time."""
        rows = self._order(adapter)
        left = self.rows_per_epoch or len(self.rows_of[adapter])
        while left > 0:
            part = list(islice(rows, min(self.rows_per_adapter, left)))
            left -= len(part)
            yield part

    def _order(self, adapter: str | int) -> Iterator[int]:
        rows = self.rows_of[adapter]
        generator = seeded_generator(self.seed, f"{adapter}:{self.epoch}")
        while True:
            yield from (rows[i] for i in torch.randperm(len(rows), generator=generator).tolist())


def slots_of(adapters: Iterable[str | int], slot_of: Mapping[str, int], column: str = "adapter") -> list[int]:
    """The slot of every name; a slot stays what it is.

    Raises:
        ValueError: a name or slot is unknown.
    """
    slots = []
    for adapter in adapters:
        slot = slot_of.get(adapter, -1) if isinstance(adapter, str) else int(adapter)
        if not 0 <= slot < len(slot_of):
            raise ValueError(f"{column}: expected one of {len(slot_of)} adapters or its slot, got {adapter!r}")
        slots.append(slot)
    return slots


def _plan(turns: Mapping[str | int, int], adapters_per_batch: int) -> list[list[str | int]]:
    """Which adapters come together; each as often as it has turns, and at most once in a batch."""
    waiting = [(-count, place, adapter) for place, (adapter, count) in enumerate(turns.items())]
    heapq.heapify(waiting)
    plan = []
    while waiting:
        batch = [heapq.heappop(waiting) for _ in range(min(adapters_per_batch, len(waiting)))]
        plan.append([adapter for _, _, adapter in batch])
        for count, place, adapter in batch:
            if count < -1:
                heapq.heappush(waiting, (count + 1, place, adapter))
    return plan


def _shares(total: int, parts: int) -> list[int]:
    """How often each of `parts` is reached in `total` steps around them."""
    return [total // parts + (i < total % parts) for i in range(parts)]
