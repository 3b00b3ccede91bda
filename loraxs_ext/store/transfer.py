"""How rows reach a slab while others of its rows are in use: in place on the CPU, on a stream of its own on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any, Protocol

import torch

from .row import AdapterRow
from .slab import Slab

# Bytes of one staging buffer: large enough that a copy over PCIe runs at full speed. At least one row is staged.
_STAGING_BYTES = 1 << 20
# One is packed while others are being copied.
_STAGING_BUFFERS = 4
# Rows that are loaded together where they need no staging: who waits for the first does not wait for many more.
_PORTION = 16


class Batch(Protocol):
    """Rows that go to the slab together."""

    def put(self, slot: int, row: AdapterRow) -> None:
        """Take a row; it isn't used after the call. ValueError if it does not fit the slab."""
        ...


class Transfer(Protocol):
    """What a pager needs of a device. Called from several threads."""

    capacity: int

    def load(self, fill: Callable[[Batch], None]) -> None:
        """Let `fill` put up to `capacity` rows; then they are in their slots, or will be in the order of the device."""
        ...

    def before_use(self, slots: Sequence[int]) -> Any:
        """What is queued from now on finds the rows of these slots; returns what `after_use` wants to know."""
        ...

    def after_use(self, slots: Sequence[int], before: Any) -> None:
        """Rows of these slots may be overwritten once what was queued until now has run."""
        ...

    def close(self) -> None:
        """Return when no copy runs any more."""
        ...


class InPlace:
    """On the CPU a row is written where it is read; who calls an op has its result when it returns."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self.capacity = _PORTION

    def load(self, fill: Callable[[Batch], None]) -> None:
        fill(self)

    def put(self, slot: int, row: AdapterRow) -> None:
        self._slab.pack(row, self._slab.rows[slot])

    def before_use(self, slots: Sequence[int]) -> None:
        pass

    def after_use(self, slots: Sequence[int], before: None) -> None:
        pass

    def close(self) -> None:
        pass


class Streamed:
    """On a GPU rows are packed into pinned buffers and copied on a stream of their own, beside the computation.

    Neither side waits on the host. The copy into a slot waits, on its stream, for the computations that were queued
    when the slot's last leases were released; a computation waits, on its stream, for the copies of the rows it reads.
    Only a staging buffer that is still being copied makes its next user wait.
    """

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        size = slab.layout.size
        self.capacity = max(1, _STAGING_BYTES // max(1, size * slab.dtype.itemsize))
        self._stream = torch.cuda.Stream(slab.device)
        # The slab's first zeros were written on the stream that is current now.
        self._stream.wait_stream(torch.cuda.current_stream(slab.device))
        # Each in its turn, so that one is packed while the last is copied.
        self._staging = cycle([_Staging(self.capacity, slab) for _ in range(_STAGING_BUFFERS)])
        # Slot -> the end of the copy that filled it, until that is known to have passed.
        self._copied: dict[int, torch.cuda.Event] = {}
        # Per slot: stream -> the end of the last computation on it that read the slot.
        self._used: list[dict[int, torch.cuda.Event]] = [{} for _ in range(slab.slots)]

    def load(self, fill: Callable[[Batch], None]) -> None:
        staging = self._next_staging()
        # Unlike what is taken out of a queue, this is given back after any interrupt.
        with staging.lock:
            staging.reuse()
            fill(staging)
            if staging.slots:
                self._copy(staging)

    def _next_staging(self) -> _Staging:
        """One that nobody packs, as far as one can know before it is locked."""
        for staging in islice(self._staging, _STAGING_BUFFERS):
            if not staging.lock.locked():
                break
        return staging

    def _copy(self, staging: _Staging) -> None:
        slots = staging.slots
        # Events of another batch's rows often coincide: a lease leaves one event for all its slots.
        for event in {event for slot in slots for event in self._used[slot].values()}:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            if len(slots) == 1:
                self._slab.rows[slots[0]].copy_(staging.rows[0], non_blocking=True)
            else:
                count = len(slots)
                staging.index[:count] = torch.tensor(slots)
                index = staging.index[:count].to(self._slab.device, non_blocking=True)
                rows = staging.rows[:count].to(self._slab.device, non_blocking=True)
                self._slab.rows.index_copy_(0, index, rows)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        staging.copied = copied
        for slot in slots:
            self._used[slot].clear()
            self._copied[slot] = copied

    def before_use(self, slots: Sequence[int]) -> torch.cuda.Stream:
        stream = torch.cuda.current_stream(self._slab.device)
        finished: dict[torch.cuda.Event, bool] = {}
        for slot in slots if self._copied else ():
            event = self._copied.get(slot)
            if event is None:
                continue
            if event not in finished:
                finished[event] = event.query()
                if not finished[event]:
                    stream.wait_event(event)
            # Nobody fills a slot in use, so this entry is still that event, or gone.
            if finished[event]:
                self._copied.pop(slot, None)
        return stream

    def after_use(self, slots: Sequence[int], before: torch.cuda.Stream) -> None:
        if not slots:
            return
        # A lease may be released by another thread than the one that computed, or by the garbage collector.
        for stream in {before, torch.cuda.current_stream(self._slab.device)}:
            event = torch.cuda.Event()
            # Recorded after it is noted: of two threads that share a slot and a stream, the event that stays is then
            # the end of both computations. The slot itself cannot be filled before both have released it.
            for slot in slots:
                self._used[slot][stream.cuda_stream] = event
            event.record(stream)

    def close(self) -> None:
        self._stream.synchronize()


class _Staging:
    """A pinned buffer of some rows on their way to the slab."""

    def __init__(self, capacity: int, slab: Slab) -> None:
        self.lock = threading.Lock()
        self._slab = slab
        with torch.inference_mode(False):
            pinned = slab.device.type == "cuda"
            self.rows = torch.empty(capacity, slab.layout.size, dtype=slab.dtype, pin_memory=pinned)
            self.index = torch.empty(capacity, dtype=torch.int64, pin_memory=pinned)
        self.slots: list[int] = []
        self.copied: torch.cuda.Event | None = None

    def reuse(self) -> None:
        """Return when the last copy from here has ended."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        self.slots = []

    def put(self, slot: int, row: AdapterRow) -> None:
        self._slab.pack(row, self.rows[len(self.slots)])
        self.slots.append(slot)


def transfer_to(slab: Slab) -> Transfer:
    """The way to this slab's device.

    Raises:
        ValueError: the slab is neither on the CPU nor on a CUDA device.
    """
    if slab.device.type == "cpu":
        return InPlace(slab)
    if slab.device.type == "cuda":
        return Streamed(slab)
    raise ValueError(f"slab: expected one on the CPU or a CUDA device, got {slab.device}")
