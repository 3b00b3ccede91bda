"""Who may read which rows: adapters come into the slab when they are asked for and stay while they are leased."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any, TypeAlias, cast

from .background import Background
from .row import RowSource
from .slab import Slab
from .transfer import Batch, transfer_to

_PREFETCH_THREADS = 2
# Owners of slots (loraxs_ext._C.Hold): what an interrupt makes us lose sight of, they give back.
_Portions: TypeAlias = deque[Any]


class Lease:
    """The slots of some adapters, whose rows neither move nor change until `release`. A context manager.

    On a GPU, `release` may come before the computation has ended: the slots are used again after what is queued by
    then, on the stream that was current at `acquire` and on the one that is current at `release`.
    """

    def __init__(self, pager: Pager, slots: list[int], hold: Any, before: Any) -> None:
        self._pager = pager
        self._slots = slots
        self._before = before
        self._hold = hold

    @property
    def slots(self) -> list[int]:
        """The slot of each name that was asked for, -1 for None.

        Raises:
            RuntimeError: the lease was released; other adapters may lie in its slots by now.
        """
        if not self._hold.held:
            raise RuntimeError("the lease was released: its slots may hold other adapters by now")
        return self._slots

    def release(self) -> None:
        """Give the slots back. A second call does nothing, unless Ctrl-C ended the first before it was done."""
        if self._hold.held:
            self._pager._transfer.after_use(self._hold.slots, self._before)
            self._hold.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if hasattr(self, "_hold") and self._hold.held:
            warnings.warn("a lease was dropped without release()", ResourceWarning, stacklevel=2)
            self.release()


class Pager:
    """Brings adapters from a source into the slots of a slab. Threads may share one; forked children may not.

    An adapter in use is never evicted; of the others, superseded versions go first and then the least recently used.
    Requests that find too few slots wait in line, first come, first served. A thread that already holds a lease
    should ask for more with a timeout: it may be waiting for itself.

    Args:
        source: where rows come from; called from several threads, outside every lock.
        slab: where they go. Nobody else may write into it.

    Raises:
        ImportError: the compiled part of the package, which holds the slot table, is missing.
    """

    def __init__(self, source: RowSource, slab: Slab) -> None:
        self.source = source
        self.slab = slab
        self._table = _slot_table(slab.slots)
        self._transfer = transfer_to(slab)
        self._background = Background(_PREFETCH_THREADS, "loraxs-prefetch")
        self._lock = threading.Lock()
        _PAGERS.add(self)
        self._loads = 0
        self._load_seconds = 0.0

    def acquire(self, names: Sequence[str | None], timeout: float | None = None) -> Lease:
        """Lease the current versions of these adapters, all or none.

        On a GPU, call it on the stream that will read the rows: that stream waits for them, the host does not.

        Args:
            names: adapters, each as often as it is needed; None stands for the base model.
            timeout: seconds to wait for slots and for rows that others are loading; None waits as long as it takes.

        Raises:
            KeyError: the source has no such adapter.
            ValueError: more distinct adapters than the slab has slots.
            TimeoutError: the slots did not become free in time.
            RuntimeError: an adapter could not be loaded, or the pager is closed, or a parent process made it.
        """
        _refuse_text(names)
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        versions = self._versions(wanted)
        deadline = None if timeout is None else time.monotonic() + timeout
        hold = None
        try:
            hold = self._table.acquire(wanted, versions, timeout)
            slots, to_load, loading = hold.slots, hold.to_load, hold.loading
            if to_load:
                self._load([wanted[i] for i in to_load], [slots[i] for i in to_load])
            if loading:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                self._table.wait([slots[i] for i in loading], left)
            before = self._transfer.before_use(slots)
            slot_of: dict[str | None, int] = dict(zip(wanted, slots, strict=True))
            return Lease(self, [slot_of.get(name, -1) for name in names], hold, before)
        except BaseException as error:
            # Not left to its end, which may be far away: the traceback keeps it.
            if hold is not None:
                hold.release(_interrupted(error))
            raise

    def prefetch(self, names: Sequence[str]) -> int:
        """Begin to load adapters that will be asked for soon, without waiting; returns how many.

        Only free slots and cold ones are taken: neither what is in use or pinned, nor what an earlier prefetch brought
        and nobody has asked for yet. An adapter that cannot be loaded is reported when it is acquired.

        Raises:
            KeyError: the source has no such adapter; nothing is loaded then.
            RuntimeError: the pager is closed.
        """
        _refuse_text(names)
        wanted = list(dict.fromkeys(names))
        versions = self._versions(wanted)
        portions: _Portions = deque()
        try:
            # So that who needs the first need not wait for the last. Each belongs to who takes it from here.
            portions += self._table.prefetch(wanted, versions, self._transfer.capacity)
            count = sum([len(hold.to_load) for hold in portions])
            for _ in range(len(portions)):
                self._background.put(partial(self._load_ahead, wanted, portions))
            return count
        except BaseException as error:
            with suppress(IndexError):
                while True:
                    portions.popleft().release(_interrupted(error))
            raise

    def pin(self, names: Sequence[str], timeout: float | None = None) -> None:
        """Load adapters and keep them, and the versions that replace them once those are asked for; see `acquire`."""
        with self.acquire(names, timeout):
            for name in names:
                self._table.pin(name)

    def unpin(self, names: Sequence[str]) -> None:
        """Let adapters be evicted again."""
        _refuse_text(names)
        for name in names:
            self._table.unpin(name)

    def stats(self) -> dict[str, int | float]:
        """Slots (`slots`, `free`, `resident`, `in_use`, `pinned`, `loading`), requests (`hits`, `misses`, `evictions`,
        `prefetches`, `failures`, `waits`, `wait_seconds`, `timeouts`, `waiting`) and loading (`loads`, `load_seconds`,
        summed over threads) since the beginning."""
        with self._lock:
            return {**self._table.stats(), "loads": self._loads, "load_seconds": self._load_seconds}

    def close(self) -> None:
        """Wake whoever waits with an error, end the threads and copies. Leases can still be released."""
        self._table.close()
        self._background.close()
        self._transfer.close()

    def __enter__(self) -> Pager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _versions(self, names: list[str]) -> list[int]:
        together = getattr(self.source, "current_versions", None)
        if together is not None:
            with suppress(KeyError):  # One by one, below, it is known which.
                return cast(list[int], together(names))
        versions = []
        for name in names:
            try:
                versions.append(self.source.version(name))
            except KeyError:
                raise KeyError(f"no adapter {name!r} in the source") from None
        return versions

    def _load(self, names: list[str], slots: list[int]) -> None:
        """Fill slots, those that can be filled. Raises the first error; others may still be loading then."""
        first: Exception | None = None
        capacity = self._transfer.capacity
        for begin in range(0, len(slots), capacity):
            error = self._load_batch(names[begin : begin + capacity], slots[begin : begin + capacity])
            first = first or error
        if first is not None:
            raise first

    def _load_batch(self, names: list[str], slots: list[int]) -> Exception | None:
        start = time.perf_counter()
        versions: dict[int, int] = {}
        errors: list[Exception] = []

        def fill(batch: Batch) -> None:
            for slot, name in zip(slots, names, strict=True):
                try:
                    row = self.source.row(name)
                    batch.put(slot, row)
                except Exception as error:
                    self._table.failed([slot], f"adapter {name!r} could not be loaded: {error}")
                    errors.append(_explain(name, error))
                else:
                    versions[slot] = row.version

        self._transfer.load(fill)
        self._table.loaded(list(versions), list(versions.values()))
        with self._lock:
            self._loads += len(versions)
            self._load_seconds += time.perf_counter() - start
        return errors[0] if errors else None

    def _load_ahead(self, wanted: list[str], portions: _Portions) -> None:
        try:
            hold = portions.popleft()
        except IndexError:
            return  # `prefetch` was interrupted, and has given it up.
        try:
            slots, to_load = hold.slots, hold.to_load
            self._load([wanted[i] for i in to_load], [slots[i] for i in to_load])
        except BaseException as error:
            # Counted, and told to who asks for the adapter.
            hold.release(_interrupted(error))
        else:
            hold.release()


class _ParentsTable:
    """The table of a pager in a forked child, where its threads are not, and maybe not who holds its lock."""

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("pager: expected the process that made it, got a child of that; make one after the fork")


_PAGERS: weakref.WeakSet[Pager] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for pager in list(_PAGERS):
        pager._table.abandon()
        pager._table = _ParentsTable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _interrupted(error: BaseException) -> str:
    """What to tell others who wait for a row that is not going to be loaded."""
    return f"loading was interrupted: {error!r}"


def _refuse_text(names: Sequence[str | None]) -> None:
    # A string is a sequence of names as well, one of each letter.
    if isinstance(names, str):
        raise TypeError(f"names: expected a list of names, got {names!r}")


def _explain(name: str, error: Exception) -> Exception:
    """The error of a source with the adapter's name."""
    if isinstance(error, KeyError):
        explained: Exception = KeyError(f"no adapter {name!r} in the source")
    else:
        explained = RuntimeError(f"adapter {name!r} could not be loaded: {error}")
    explained.__cause__ = error
    return explained


def _slot_table(slots: int) -> Any:
    try:
        return import_module("loraxs_ext._C").SlotTable(slots)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "Pager needs the compiled part of loraxs_ext, which is missing or older than this file: build it with "
            f"`pip install --no-build-isolation -e .` ({error})"
        ) from error
