"""A writing process is really killed, hundreds of times, at random moments.

After every kill the store must hold what the writer had been told was committed, plus all or nothing of the one
operation it was at. A reader in a third process looks on all the time. Two writers that break the rules show that the
test sees it.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraxs_ext.store import AdapterRow, AdapterStore, RowLayout, Segment

from . import stores
from .test_processes import ended_well, forked

pytest.importorskip("lmdb")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")

# How many writers are killed, and how many seconds at most after something was acknowledged: about as long as a commit
# takes, which is longer where it waits for the disk.
SYNC, NO_SYNC = (80, 0.02), (220, 0.004)
# One kind of record lies inside a page of the tree, the other one on pages of its own.
SMALL = RowLayout([Segment(stores.KEYS[0], 4)])
LARGE = RowLayout([Segment(key, 40) for key in stores.KEYS])
NAMES = [f"user/{i}" for i in range(12)]

# Names with the seeds of their numbers; a seed of 0 deletes.
Operation = list[tuple[str, int]]
# Of a name: the last version it had, and the seed of its numbers, 0 if it was deleted.
State = dict[str, tuple[int, int]]
Apply = Callable[[AdapterStore, Operation], None]


def operations(kill: int) -> Callable[[int], Operation]:
    """What the writer of this number does, step by step: known to it and to who watches."""

    def step(index: int) -> Operation:
        draw = random.Random(kill * 100003 + index)
        if draw.random() < 0.2:
            return [(draw.choice(NAMES), 0)]
        count = draw.choice([1, 1, 8])
        return [(name, 1 + draw.randrange(1 << 30)) for name in draw.sample(NAMES, count)]

    return step


def content(name: str, seed: int) -> AdapterRow:
    layout = LARGE if seed % 2 else SMALL
    return AdapterRow(name, 0, layout, torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)))


def put(store: AdapterStore, operation: Operation) -> None:
    """As a user of the store does it."""
    if operation[0][1]:
        store.put_many([content(*entry) for entry in operation])
    elif operation[0][0] in store:
        store.delete(operation[0][0])


def after(state: State, operation: Operation) -> State:
    """What `put` makes of a state."""
    changed = dict(state)
    for name, seed in operation:
        version, present = changed.get(name, (0, 0))
        if seed or present:
            changed[name] = (version + (seed > 0), seed)
    return changed


def differs(store: AdapterStore, state: State) -> str | None:
    """The first difference between a store and what it should hold."""
    present = {name: entry for name, entry in state.items() if entry[1]}
    if list(store) != sorted(present):
        return f"expected the adapters {sorted(present)}, got {list(store)}"
    for name, (version, seed) in present.items():
        row = store.row(name)
        if row.version != version or not stores.same(row, content(name, seed)):
            return f"expected version {version} of {name}, got another content or version {row.version}"
    return None


def kill_writers(path: Path, apply: Apply, *, sync: bool) -> int:
    """Let writers work on a store and kill them one after the other; how many operations were acknowledged.

    Raises:
        AssertionError: a kill left something else than it should.
    """
    AdapterStore.create(path, stores.manifest(rank=40)).close()
    kills, longest = SYNC if sync else NO_SYNC
    state: State = {}
    moments = random.Random(0)
    acknowledged = 0
    for kill in range(kills):
        step = operations(kill)
        reader, writer = os.pipe()

        def write() -> None:
            with AdapterStore(path, sync=sync) as store:
                os.write(writer, b"open")  # noqa: B023
                for index in range(1 << 30):
                    apply(store, step(index))  # noqa: B023
                    os.write(writer, struct.pack("<I", index))  # noqa: B023

        pid = forked(write)
        os.close(writer)
        # One in ten while it opens the store, the others in the midst of writing.
        heard = b""
        wanted = 0 if moments.random() < 0.1 else 1 + moments.randrange(4)
        while len(heard) < 4 * wanted:
            heard += os.read(reader, 4 * wanted - len(heard))
        time.sleep(moments.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader, "rb") as pipe:
            done = max(0, len(heard + pipe.read()) // 4 - 1)
        for index in range(done):
            state = after(state, step(index))
        acknowledged += done
        allowed = [state, after(state, step(done))]
        # A writer that died between the last byte of a commit and telling readers of it is found out by the next
        # writer, so what it was at may show only then.
        for readonly in (True, False):
            with AdapterStore(path, readonly=readonly) as store:
                assert store.check() == [], f"kill {kill}"
                found = [differs(store, candidate) for candidate in allowed]
            assert None in found, f"kill {kill}, {done} acknowledged: {found}"
            allowed = allowed[found.index(None) :]
        state = allowed[0]

    return acknowledged


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "no sync"])
def test_a_killed_writer_loses_nothing_and_leaves_nothing_half(tmp_path: Path, sync: bool) -> None:
    path, stop = tmp_path / "store", tmp_path / "stop"

    def look_on() -> None:
        while not (path / "data.mdb").exists():
            time.sleep(0.001)
        versions: dict[str, int] = {}
        with AdapterStore(path, readonly=True) as store:
            while not stop.exists():
                for name in NAMES:
                    try:
                        # Decoding verifies the checksum.
                        version = store.row(name).version
                    except KeyError:
                        continue
                    assert version >= versions.get(name, 0)
                    versions[name] = version
                time.sleep(0.002)
        assert versions

    onlooker = forked(look_on)
    try:
        acknowledged = kill_writers(path, put, sync=sync)
    finally:
        stop.touch()
    assert ended_well(onlooker)
    # They were not killed before they came to anything.
    assert acknowledged > (SYNC if sync else NO_SYNC)[0]


def put_one_by_one(store: AdapterStore, operation: Operation) -> None:
    for entry in operation:
        put(store, [entry])


class Forgetful:
    """Acknowledges what it keeps in memory, and commits every third time."""

    def __init__(self) -> None:
        self.waiting: list[Operation] = []

    def __call__(self, store: AdapterStore, operation: Operation) -> None:
        self.waiting.append(operation)
        if len(self.waiting) == 3:
            for operation in self.waiting:
                put(store, operation)
            self.waiting.clear()


@pytest.mark.parametrize("apply", [put_one_by_one, Forgetful()], ids=["half a batch", "acknowledged too early"])
def test_a_writer_that_breaks_the_rules_is_found_out(tmp_path: Path, apply: Apply) -> None:
    with pytest.raises(AssertionError, match="expected (the adapters|version)"):
        kill_writers(tmp_path / "store", apply, sync=False)
