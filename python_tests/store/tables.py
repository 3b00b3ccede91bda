"""What tests of the slot table do with one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

native = pytest.importorskip("loraxs_ext._C", reason="the native parts are not built")
if not hasattr(native, "SlotTable"):
    pytest.skip("the native parts are older than these tests", allow_module_level=True)


class SlotTable(native.SlotTable):
    """Keeps the holds, so that a test can say which slots are given back, and when."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.holds = []

    def release(self, slots: list[int]) -> None:
        hold = next(hold for hold in self.holds if hold.slots == slots)
        self.holds.remove(hold)
        hold.release()


LONG = 30.0  # seconds; only a broken table takes as long


def acquire(table, *keys: tuple[str, int], timeout: float | None = 0.0):
    table.holds.append(table.acquire([name for name, _ in keys], [version for _, version in keys], timeout))
    return kept(table.holds[-1])


def kept(hold) -> tuple[list[int], list[int], list[int]]:
    """What a hold says: the slots, and the positions of names to load and of names that others load."""
    return hold.slots, hold.to_load, hold.loading


def prefetch(table, names: list[str], portion: int = 9, version: int = 1):
    """In one portion; what is not there to be loaded has no hold."""
    table.holds += (holds := table.prefetch(names, [version] * len(names), portion))
    return [kept(hold) for hold in holds]


def load(table, *keys: tuple[str, int]) -> list[int]:
    """Acquire, and load what isn't there."""
    slots, to_load, _ = acquire(table, *keys)
    table.loaded([slots[i] for i in to_load], [keys[i][1] for i in to_load])
    return slots


def touch(table, *names: str) -> list[int]:
    """Load and release, one after the other: the last is the most recent."""
    slots = []
    for name in names:
        slots += load(table, (name, 1))
        table.release(slots[-1:])
    return slots


def resident(table, *names: str, version: int = 1) -> list[str]:
    """Which of them lie in a slot; asks in a way that evicts nothing, but makes all of them recent."""
    found = []
    for name in names:
        try:
            slots, to_load, _ = acquire(table, (name, version))
        except TimeoutError:
            continue
        if to_load:
            table.failed(slots, "only asked")
        else:
            found.append(name)
        table.release(slots)
    return found


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def in_thread(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def load_waiting(table, keys) -> list[int]:
    slots, to_load, _ = acquire(table, *keys, timeout=LONG)
    table.loaded([slots[i] for i in to_load], [keys[i][1] for i in to_load])
    return slots
