"""Rows that come and go beside the computation: copies on their own stream, slots evicted while they are read."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loraxs_ext.store import AdapterRow, Pager, RowLayout, Segment, Slab

from ..store.sources import MemorySource
from ..store.test_slab import LAYOUTS, SLAB, make_row

pytestmark = pytest.mark.gpu

LONG = 60.0  # seconds; only a broken pager takes as long
# 107,520 bytes in fp32: 210 modules of rank 4, as large models have them, and some of rank 11 for odd places.
LAYOUT = RowLayout([Segment(f"module {i}", 11 if i % 30 == 0 else 4) for i in range(210)])


def busy(seconds: float) -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(int(seconds * 1.5e9))


def now_on_stream() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


@pytest.fixture
def source() -> MemorySource:
    return MemorySource(LAYOUT)


def make_pager(source: MemorySource, slots: int) -> Pager:
    """A pager that has copied one row and several: the first launch of a kernel and the first allocation may wait."""
    pager = Pager(source, Slab(source.layout, slots, torch.float32, "cuda"))
    for count in (1, min(slots, 3)):
        with pager.acquire([f"warm {count} {i}" for i in range(count)]) as lease:
            pager.slab.rows[lease.slots[0]].clone()
    torch.cuda.synchronize()
    return pager


def expected(source: MemorySource, name: str, slab: Slab) -> Tensor:
    return source.numbers(name).to(slab.dtype)


def until_idle(pager: Pager) -> None:
    end = time.monotonic() + LONG
    while pager.stats()["in_use"]:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
def test_rows_are_what_the_cpu_writes(source_dtype, dtype):
    rows = [make_row(layout, source_dtype, seed) for seed, layout in enumerate(LAYOUTS.values())]
    slots = list(range(len(rows)))[::-1]
    here, there = Slab(SLAB, len(rows), dtype), Slab(SLAB, len(rows), dtype, "cuda")
    here.write_many(slots, rows)
    there.write_many(slots, rows)
    assert torch.equal(there.rows.cpu(), here.rows)
    there.rows.fill_(torch.nan)
    for slot, row in zip(slots, rows, strict=True):
        there.write(slot, row)
    assert torch.equal(there.rows.cpu(), here.rows)

    class Rows:
        def version(self, name: str) -> int:
            return 1

        def row(self, name: str) -> AdapterRow:
            return rows[int(name)]

    with Pager(Rows(), Slab(SLAB, len(rows), dtype, "cuda")) as pager:
        with pager.acquire([str(i) for i in range(len(rows))]) as lease:
            for i, slot in enumerate(lease.slots):
                assert torch.equal(pager.slab.rows[slot].cpu(), here.rows[slots[i]])


def test_a_slot_evicted_while_a_kernel_reads_it(source):
    with make_pager(source, 1) as pager:
        found = []
        for name in ("a", "b", "c"):
            with pager.acquire([name]) as lease:
                # The read comes long after the next adapter has been asked for.
                busy(0.2)
                found.append((name, pager.slab.rows[lease.slots[0]].clone()))
        end = now_on_stream()
        assert not end.query(), "the host waited: this test sees nothing"
        for name, row in found:
            assert torch.equal(row.cpu(), expected(source, name, pager.slab))


def test_a_new_request_does_not_wait_for_what_computes_elsewhere(source):
    with make_pager(source, 2) as pager:
        first = pager.acquire(["a"])
        torch.cuda.synchronize()
        busy(1.0)
        end = now_on_stream()
        with torch.cuda.stream(torch.cuda.Stream()):
            with pager.acquire(["b"]) as lease:
                row = pager.slab.rows[lease.slots[0]].cpu()
        assert not end.query()
        assert torch.equal(row, expected(source, "b", pager.slab))
        first.release()


def test_prefetch_copies_beside_the_computation(source):
    with make_pager(source, 4) as pager:
        misses = pager.stats()["misses"]
        busy(1.0)
        end = now_on_stream()
        assert pager.prefetch(["a", "b", "c"]) == 3
        until_idle(pager)
        pager._transfer._stream.synchronize()  # type: ignore[attr-defined]
        assert not end.query()
        with pager.acquire(["a", "b", "c"]) as lease:
            for name, slot in zip("abc", lease.slots, strict=True):
                assert torch.equal(pager.slab.rows[slot].cpu(), expected(source, name, pager.slab))
        assert pager.stats()["misses"] == misses


def test_a_row_read_on_one_stream_and_replaced_for_another(source):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with make_pager(source, 1) as pager:
        found = []
        for i in range(20):
            name = f"adapter {i}"
            with torch.cuda.stream(streams[i % 2]), pager.acquire([name]) as lease:
                busy(0.01)
                found.append((name, pager.slab.rows[lease.slots[0]].clone()))
        for name, row in found:
            assert torch.equal(row.cpu(), expected(source, name, pager.slab))


@pytest.fixture(params=[6, 64], ids=["few slots", "many slots"])
def slots(request) -> Iterator[int]:
    yield request.param


def test_contents_under_many_threads_and_streams(source, slots):
    threads, rounds = 6, 80
    names = [f"adapter {i}" for i in range(3 * slots)]
    rows = {name: source.numbers(name) for name in names}
    problems: list[str] = []
    with make_pager(source, slots) as pager:

        def work(number: int) -> None:
            choose = random.Random(number)
            stream = torch.cuda.Stream()
            found: list[tuple[list[str], Tensor]] = []
            with torch.cuda.stream(stream):
                for _ in range(rounds):
                    some = choose.sample(names, choose.randint(1, slots // 2))
                    if choose.random() < 0.5:
                        pager.prefetch(choose.sample(names, 2))
                    lease = pager.acquire(some, timeout=LONG)
                    index = torch.tensor(lease.slots).pin_memory().to("cuda", non_blocking=True)
                    busy(choose.choice([0, 1e-4, 1e-3]))
                    found.append((some, pager.slab.rows[index]))
                    # Not synchronised: the read is still queued.
                    lease.release()
            stream.synchronize()
            for some, got in found:
                for name, row in zip(some, got.cpu(), strict=True):
                    if not torch.equal(row, rows[name]):
                        problems.append(f"thread {number}: {name}")

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(2 * LONG)
        assert not any(worker.is_alive() for worker in workers) and problems == []
        assert pager.stats()["evictions"] > 100
        until_idle(pager)
