"""The order of copies and computations on streams: every read after its row's copy, every copy after the last reads.

The streams are pretended (see `streams`), so that what could run at the same time is seen, not hoped for.
"""

from __future__ import annotations

import random
from importlib import import_module
from itertools import islice

import pytest
import torch

from loraxs_ext.store import Lease, Pager, Slab

from . import streams
from .sources import LAYOUT, MemorySource
from .streams import STREAMS, Clock, Event, reached

_C = pytest.importorskip("loraxs_ext._C", reason="the native parts are not built")
if not hasattr(_C, "SlotTable"):
    pytest.skip("the native parts are older than these tests", allow_module_level=True)

transfer = import_module("loraxs_ext.store.transfer")


class Watched(transfer.Streamed):
    """Notes when rows are copied and staging buffers are packed, and objects to what comes too early."""

    def __init__(self, slab: Slab) -> None:
        super().__init__(slab)
        self.copies: dict[int, Clock] = {}
        self.reads: list[list[Clock]] = [[] for _ in range(slab.slots)]
        self.staged: dict[int, Clock] = {}

    def load(self, fill) -> None:
        def watched(staging) -> None:
            before = self.staged.get(id(staging), Clock())
            assert reached(streams.HOST.known, before), "packed while it is being copied"
            fill(staging)

        super().load(watched)

    def _copy(self, staging) -> None:
        super()._copy(staging)
        for slot in staging.slots:
            # The copy stood between the waits and the event, so it knew no more than the event does.
            assert all(reached(staging.copied.clock, read) for read in self.reads[slot]), "overwritten while it is read"
            self.reads[slot].clear()
            self.copies[slot] = staging.copied.clock
        self.staged[id(staging)] = staging.copied.clock

    def read(self, lease: Lease) -> None:
        """A computation with the rows of a lease, on the current stream."""
        clock = streams.current_stream().step()
        for slot in lease.slots:
            assert reached(clock, self.copies[slot]), "read before it was copied"
            self.reads[slot].append(clock)


@pytest.fixture
def pager(monkeypatch):
    streams.install(monkeypatch)
    monkeypatch.setattr(import_module("loraxs_ext.store.pager"), "transfer_to", Watched)
    monkeypatch.setattr(transfer, "_STAGING_BYTES", 3 * LAYOUT.size * 4)  # three rows
    with Pager(MemorySource(), Slab(LAYOUT, 4)) as pager:
        yield pager


def holds(pager: Pager, lease: Lease, names: list[str]) -> bool:
    return all(
        torch.equal(pager.slab.rows[slot], pager.source.numbers(name))
        for slot, name in zip(lease.slots, names, strict=True)
    )


def test_the_first_copy_waits_for_the_zeros_of_the_slab(monkeypatch):
    streams.install(monkeypatch)
    zeros = STREAMS["compute"].step()
    assert reached(transfer.Streamed(Slab(LAYOUT, 1))._stream.known, zeros)


def test_rows_arrive_through_staging(pager):
    names = list("abcd")  # more than one buffer holds
    with pager.acquire(names) as lease:
        assert holds(pager, lease, names)
        pager._transfer.read(lease)


def test_a_reader_waits_for_the_copies_of_its_rows_only(pager):
    copier = pager._transfer._stream
    with pager.acquire(["a"]) as lease:
        pager._transfer.read(lease)
    known = STREAMS["compute"].known[copier.cuda_stream]
    with streams.on(STREAMS["other"]):
        pager.acquire(["b"]).release()
    with pager.acquire(["a"]):
        assert STREAMS["compute"].known[copier.cuda_stream] == known
    with pager.acquire(["b"]):
        assert STREAMS["compute"].known[copier.cuda_stream] > known


def test_a_copy_waits_for_the_readers_of_its_slot_only(pager):
    copier = pager._transfer._stream
    compute = STREAMS["compute"].cuda_stream
    with pager.acquire(["a"]) as lease:
        pager._transfer.read(lease)
    released = STREAMS["compute"].known[compute]
    for name in "bcd":
        pager.acquire([name]).release()
    assert copier.known[compute] < released
    held = pager.acquire(["b", "c", "d"])
    assert pager.prefetch(["e"]) == 1  # into the slot of a
    with pager.acquire(["e"]) as lease:
        assert released <= copier.known[compute] < STREAMS["compute"].known[compute]
    held.release()


def test_a_lease_may_be_released_on_another_stream(pager):
    lease = pager.acquire(["a", "b", "c", "d"])
    pager._transfer.read(lease)
    with streams.on(STREAMS["other"]):
        pager._transfer.before_use(lease.slots)
        pager._transfer.read(lease)
        lease.release()
        with pager.acquire(["e"]) as lease:
            pager._transfer.read(lease)


def test_the_host_waits_for_nothing_but_staging(pager):
    with pager.acquire(["a", "b"]) as lease:
        pager._transfer.read(lease)
    assert not streams.HOST.known


def test_the_end_waits_for_all_copies(pager):
    pager.acquire(["a"]).release()
    assert not streams.HOST.known
    pager.close()
    assert reached(streams.HOST.known, pager._transfer._stream.known)


def test_a_use_is_noted_before_its_end_is_recorded_and_before_the_slot_is_given_back(pager, monkeypatch):
    """Else another thread could fill the slot, or take an end that lies before this one for the last."""
    lease = pager.acquire(["a"])
    seen, record = [], Event.record
    used = pager._transfer._used[lease.slots[0]]

    def watched(event, stream):
        seen.append(event in used.values() and pager.stats()["in_use"] == 1)
        record(event, stream)

    monkeypatch.setattr(Event, "record", watched)
    lease.release()
    assert seen == [True] and pager.stats()["in_use"] == 0


def test_no_staging_buffer_is_lost_by_an_interrupt(pager):
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    pager.source.before_row = interrupt
    for _ in range(transfer._STAGING_BUFFERS + 1):
        assert not any(one.lock.locked() for one in islice(pager._transfer._staging, transfer._STAGING_BUFFERS))
        with pytest.raises(KeyboardInterrupt):
            pager.acquire(["a"])


@pytest.mark.parametrize("seed", range(4))
def test_order_in_any_mixture(pager, seed):
    choose = random.Random(seed)
    names = [f"adapter {i}" for i in range(9)]
    leases: list[tuple[Lease, streams.Stream, list[str]]] = []
    for _ in range(1500):
        Event.over = choose.random() < 0.2
        stream = STREAMS[choose.choice(["compute", "other"])]
        if leases and (len(leases) == 2 or choose.random() < 0.5):
            lease, stream, some = leases.pop(choose.randrange(len(leases)))
            with streams.on(stream):
                pager._transfer.read(lease)
                assert holds(pager, lease, some)
                lease.release()
        elif choose.random() < 0.3:
            pager.prefetch(choose.sample(names, 2))
        else:
            some = choose.sample(names, choose.randint(1, 2))
            with streams.on(stream):
                leases.append((pager.acquire(some, timeout=30), stream, some))
                pager._transfer.read(leases[-1][0])
    for lease, stream, _ in leases:
        with streams.on(stream):
            lease.release()
    assert pager.stats()["evictions"] > 200 and pager.stats()["prefetches"] > 50
