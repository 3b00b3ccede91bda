"""A process that is interrupted by signals, hundreds of times, and loses nothing; for `test_interrupts`.

`python -m python_tests.store.interrupted acquire|prefetch|store` ends by itself and prints how many signals came in
between: into a pager, or into the reads and the closing of a store.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from loraxs_ext.store import Pager, Slab

from . import stores
from .sources import LAYOUT, MemorySource

SIGNALS, SLOTS = 200, 4
ACTIONS: dict[str, Callable[[Pager, list[str]], object]] = {
    "acquire": lambda pager, names: pager.acquire(names).release(),
    "prefetch": lambda pager, names: pager.prefetch(names),
}
PATIENCE = 10.0  # seconds; only a broken pager takes as long


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def interrupted(action: Callable[[], object], seconds: float) -> bool:
    """Whether a signal after so many seconds came before the end of `action`."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            action()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            # One that came just now is heard at the next call of a Python function, and not later.
            nothing()
    except KeyboardInterrupt:
        return True
    return False


def nothing() -> None:
    pass


def check(pager: Pager, round_: int) -> None:
    """Every slot can be had and holds what was asked for, and the threads live."""
    end = time.monotonic() + PATIENCE
    while (stats := pager.stats())["in_use"] or stats["loading"]:
        assert time.monotonic() < end, stats
        time.sleep(0.0001)
    for letters in ("efgh", "ijkl"):
        names = [f"{round_:04}{letter}" for letter in letters]
        # What a prefetch brought, and nobody has asked for, another leaves alone: so only in the second turn.
        assert letters == "efgh" or pager.prefetch(names) == SLOTS
        with pager.acquire(names, PATIENCE) as lease:
            assert sorted(lease.slots) == list(range(SLOTS))
            for name, slot in zip(names, lease.slots, strict=True):
                assert torch.equal(pager.slab.rows[slot], pager.source.numbers(name))  # type: ignore[attr-defined]


def interrupt_a_store() -> None:
    choose, signals, longest = random.Random(0), 0, 1e-3
    with tempfile.TemporaryDirectory() as folder, stores.create(Path(folder) / "store") as store:
        store.put(stores.row("alice"))
        while signals < SIGNALS:
            actions = [partial(store.row, "alice"), partial(store.put, stores.row("alice"))]
            came = interrupted(choose.choice(actions), choose.uniform(1e-6, longest))
            signals += came
            longest *= 1.05 if came else 0.95
            # Another thread gets in, and this one alone.
            other = threading.Thread(target=store.row, args=("alice",), daemon=True)
            other.start()
            other.join(PATIENCE)
            assert not other.is_alive()
            with store._environment._gate.alone():
                pass
    print(signals)


def interrupt_a_pager(action: str) -> None:
    choose, source = random.Random(0), MemorySource()
    signals, longest, round_ = 0, 1e-3, 0
    while signals < SIGNALS:
        # The first call of a pager does things that the others do not.
        with Pager(source, Slab(LAYOUT, SLOTS)) as pager:
            for _ in range(8):
                round_ += 1
                names = [f"{round_:04}{letter}" for letter in "abcd"]
                came = interrupted(partial(ACTIONS[action], pager, names), choose.uniform(1e-6, longest))
                signals += came
                # About every second one shall come in time, on a machine of any speed.
                longest *= 1.05 if came else 0.95
                check(pager, round_)
    print(signals)


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, interrupt)
    warnings.simplefilter("ignore", ResourceWarning)
    # What is interrupted in a finaliser is printed, else.
    sys.unraisablehook = lambda unraisable: None
    interrupt_a_store() if sys.argv[1] == "store" else interrupt_a_pager(sys.argv[1])
