"""Adapters that come and go: what a lease promises, what happens when loading fails, and many threads at once."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from loraxs_ext.store import Pager, RowLayout, Segment, Slab

from .sources import LAYOUT, MemorySource

_C = pytest.importorskip("loraxs_ext._C", reason="the native parts are not built")
if not hasattr(_C, "SlotTable"):
    pytest.skip("the native parts are older than these tests", allow_module_level=True)

LONG = 30.0  # seconds; only a broken pager takes as long


@pytest.fixture
def source() -> MemorySource:
    return MemorySource()


@pytest.fixture
def pager(source) -> Iterator[Pager]:
    with Pager(source, Slab(LAYOUT, 4)) as pager:
        yield pager


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def holds(pager: Pager, slot: int, name: str, version: int = 1) -> bool:
    return torch.equal(pager.slab.rows[slot], pager.source.numbers(name, version))  # type: ignore[attr-defined]


def idle(pager: Pager) -> bool:
    stats = pager.stats()
    return not (stats["in_use"] or stats["loading"] or stats["waiting"])


def test_a_lease_has_a_slot_for_every_name(pager, source):
    with pager.acquire(["alice", None, "bob", "alice"]) as lease:
        first, base, second, again = lease.slots
        assert base == -1 and first == again != second
        assert holds(pager, first, "alice") and holds(pager, second, "bob")
    with pager.acquire(["bob"]) as lease:
        assert lease.slots == [second]
    assert source.loads == {"alice": 1, "bob": 1}
    assert idle(pager) and pager.stats()["loads"] == 2 and pager.stats()["load_seconds"] > 0


def test_nothing_but_the_base_model(pager):
    with pager.acquire([None, None]) as lease:
        assert lease.slots == [-1, -1]
    with pager.acquire([]) as lease:
        assert lease.slots == []


def test_a_released_lease_refuses(pager):
    lease = pager.acquire(["alice"])
    lease.release()
    lease.release()
    with pytest.raises(RuntimeError, match="the lease was released"):
        _ = lease.slots
    assert idle(pager)


def test_a_dropped_lease_is_given_back_with_a_warning(pager):
    lease = pager.acquire(["alice"])
    with pytest.warns(ResourceWarning, match="without release"):
        del lease
        gc.collect()
    assert idle(pager)


def test_a_replaced_adapter_gets_another_slot_and_the_running_lease_keeps_its_own(pager, source):
    old = pager.acquire(["alice"])
    source.replace("alice")
    with pager.acquire(["alice"]) as new:
        assert new.slots != old.slots
        assert holds(pager, old.slots[0], "alice", 1) and holds(pager, new.slots[0], "alice", 2)
    with pager.acquire(["alice"]) as again:
        assert holds(pager, again.slots[0], "alice", 2)
    old.release()
    assert source.loads == {"alice": 2}


def test_an_adapter_replaced_between_question_and_answer(pager, source):
    source.before_row = lambda name: source.loads[name] or source.replace(name)
    with pager.acquire(["alice"]) as lease:
        assert holds(pager, lease.slots[0], "alice", 2)
        with pager.acquire(["alice"]) as again:
            assert again.slots == lease.slots
    assert source.loads == {"alice": 1}


def test_unknown_adapters_are_named_and_nothing_is_loaded(pager, source):
    with pytest.raises(KeyError, match="no adapter 'unknown' in the source"):
        pager.acquire(["alice", "unknown"])
    with pytest.raises(KeyError, match="no adapter 'unknown' in the source"):
        pager.prefetch(["alice", "unknown"])
    assert idle(pager) and not source.loads


def test_a_source_that_tells_many_versions_is_asked_once(source):
    asked = []

    def current_versions(names):
        asked.append(list(names))
        return [source.version(name) for name in names]

    source.current_versions = current_versions
    with Pager(source, Slab(LAYOUT, 4)) as pager:
        pager.acquire(["bob", None, "alice", "bob"]).release()
        source.replace("bob")
        pager.acquire(["alice", "bob"]).release()
        with pytest.raises(KeyError, match="no adapter 'unknown' in the source"):
            pager.acquire(["alice", "unknown"])
    assert asked == [["bob", "alice"], ["alice", "bob"], ["alice", "unknown"]]
    assert source.loads == {"alice": 1, "bob": 2}


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ValueError("checksum 1, expected 2"), RuntimeError, "adapter 'bob' could not be loaded: checksum 1, expected"),
        (OSError("disk gone"), RuntimeError, "adapter 'bob' could not be loaded: disk gone"),
        (KeyError("bob"), KeyError, "no adapter 'bob' in the source"),  # deleted after its version was read
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_source_that_fails(pager, source, error, expected, message):
    def fail(name: str) -> None:
        if name == "bob":
            raise error

    source.before_row = fail
    for _ in range(10):  # more often than there are slots to leak
        with pytest.raises(expected, match=message) as caught:
            pager.acquire(["alice", "bob", "carol"])
        assert caught.value is error or caught.value.__cause__ is error
    assert idle(pager)
    source.before_row = lambda name: None
    with pager.acquire(["alice", "bob", "carol", "dave"]) as lease:
        assert all(holds(pager, slot, name) for slot, name in zip(lease.slots, ["alice", "bob", "carol"], strict=False))


def test_a_row_that_does_not_fit(pager, source):
    source.layout = RowLayout([Segment("q", 4)])
    with pytest.raises(RuntimeError, match="adapter 'alice' could not be loaded: .* q: expected rank 3 or less, got 4"):
        pager.acquire(["alice"])
    assert idle(pager)


def test_a_failure_is_told_to_the_others_who_wait_for_it(pager, source):
    begun, go_on = threading.Event(), threading.Event()

    def fail(name: str) -> None:
        begun.set()
        go_on.wait(LONG)
        raise ValueError("torn record")

    source.before_row = fail
    errors: list[Exception] = []

    def ask() -> None:
        try:
            pager.acquire(["alice"])
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(LONG)
    until(lambda: pager.stats()["hits"] == 2)
    go_on.set()
    for thread in threads:
        thread.join(LONG)
    assert [str(error) for error in errors] == 3 * ["adapter 'alice' could not be loaded: torn record"]
    assert idle(pager) and pager.stats()["failures"] == 1


def test_too_many_at_once(pager):
    with pytest.raises(ValueError, match="got 5 for 4 slots"):
        pager.acquire(list("abcde"))


def test_a_request_waits_for_slots_and_gives_up_in_time(pager):
    lease = pager.acquire(list("abc"))
    with pytest.raises(TimeoutError, match="1 of 4 slots could be given away"):
        pager.acquire(["d", "e"], timeout=0.01)
    slots: list[int] = []

    def ask() -> None:
        with pager.acquire(["d", "e"], timeout=LONG) as later:
            slots.extend(later.slots)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: pager.stats()["waiting"] == 1)
    assert not slots
    lease.release()
    thread.join(LONG)
    assert len(slots) == 2 and idle(pager)


def test_others_do_not_wait_for_a_slow_load(pager, source):
    begun, go_on = threading.Event(), threading.Event()

    def slow(name: str) -> None:
        if name == "slow":
            begun.set()
            go_on.wait(LONG)

    source.before_row = slow
    thread = threading.Thread(target=lambda: pager.acquire(["slow"]).release())
    thread.start()
    assert begun.wait(LONG)
    with pager.acquire(["alice"], timeout=LONG) as lease:
        assert holds(pager, lease.slots[0], "alice")
    with pytest.raises(TimeoutError, match="another thread is loading"):
        pager.acquire(["alice", "slow"], timeout=0.01)
    go_on.set()
    thread.join(LONG)
    assert idle(pager)


def test_prefetched_rows_are_there_when_they_are_asked_for(pager, source):
    assert pager.prefetch(["alice", "bob", "alice"]) == 2
    with pager.acquire(["alice", "bob"]) as lease:
        assert holds(pager, lease.slots[0], "alice") and holds(pager, lease.slots[1], "bob")
    assert source.loads == {"alice": 1, "bob": 1}
    assert pager.stats()["prefetches"] == 2 and pager.stats()["misses"] == 0
    assert pager.prefetch(["alice"]) == 0


def test_prefetch_neither_waits_nor_takes_what_is_in_use(pager, source):
    with pager.acquire(list("abcd")) as lease:
        assert pager.prefetch(["e", "f"]) == 0
        assert all(holds(pager, slot, name) for slot, name in zip(lease.slots, "abcd", strict=True))
    assert pager.prefetch(["e", "f"]) == 2
    until(lambda: idle(pager))


def test_a_prefetch_that_fails_is_reported_to_who_asks(pager, source):
    def fail(name: str) -> None:
        raise ValueError("torn record")

    source.before_row = fail
    for _ in range(10):
        pager.prefetch(["alice"])
        until(lambda: idle(pager))
    with pytest.raises(RuntimeError, match="adapter 'alice' could not be loaded: torn record"):
        pager.acquire(["alice"])
    assert idle(pager) and pager.stats()["failures"] == 11


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_does_not_hang(pager, source):
    begun, go_on = threading.Event(), threading.Event()
    source.before_row = lambda name: name == "slow" and (begun.set(), go_on.wait(LONG))
    threads = [threading.Thread(target=lambda: pager.acquire(["slow"]).release()) for _ in range(2)]
    with pager.acquire(["alice"]) as lease:
        for thread in threads:
            thread.start()
        assert begun.wait(LONG)
        until(lambda: pager.stats()["hits"] == 1)  # The other waits, within the table.
        child = os.fork()
        if child == 0:
            signal.alarm(int(LONG))
            told = 0
            lease.release()
            for action in (pager.acquire, pager.prefetch, pager.pin):
                try:
                    action(["bob"])
                except RuntimeError as error:
                    told += "make one after the fork" in str(error)
            pager.close()
            os._exit(told)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert pager.stats()["in_use"] == 2
        go_on.set()
        for thread in threads:
            thread.join(LONG)
    assert idle(pager)


@pytest.mark.parametrize("action", ["acquire", "prefetch", "pin", "unpin"])
def test_one_name_is_no_list_of_names(pager, action):
    with pytest.raises(TypeError, match="names: expected a list of names, got 'ab'"):
        getattr(pager, action)("ab")


def test_pinned_adapters_stay(pager, source):
    pager.pin(["alice", "bob"])
    assert idle(pager) and pager.stats()["pinned"] == 2
    for name in "cdefg":
        pager.acquire([name]).release()
    with pager.acquire(["alice", "bob"]):
        assert source.loads["alice"] == source.loads["bob"] == 1
    with pytest.raises(TimeoutError):
        pager.acquire(["c", "d", "e"], timeout=0.01)
    pager.unpin(["alice", "bob"])
    pager.acquire(["c", "d", "e", "f"]).release()
    assert pager.stats()["pinned"] == 0


def test_what_is_pinned_is_held_until_then(pager, monkeypatch):
    """Else it could be evicted between the two."""
    table, used = pager._table, []
    watched = SimpleNamespace(acquire=table.acquire, loaded=table.loaded, close=table.close)
    watched.pin = lambda name: used.append((name, table.stats()["in_use"])) or table.pin(name)
    monkeypatch.setattr(pager, "_table", watched)
    pager.pin(["alice", "bob"])
    assert used == [("alice", 2), ("bob", 2)] and table.stats()["pinned"] == 2


def test_the_wait_for_slots_is_part_of_the_timeout(pager, monkeypatch):
    clock, waited = iter([100.0, 103.0]), []
    hold = SimpleNamespace(slots=[2], to_load=[], loading=[0], held=True, release=lambda *reason: None)
    table = SimpleNamespace(
        acquire=lambda names, versions, timeout: hold,
        wait=lambda slots, timeout: waited.append((slots, timeout)),
        close=lambda: None,
    )
    monkeypatch.setattr(pager, "_table", table)
    monkeypatch.setattr("loraxs_ext.store.pager.time", SimpleNamespace(monotonic=lambda: next(clock)))
    pager.acquire(["alice"], timeout=5).release()
    assert waited == [([2], 2.0)]


def test_close(source):
    pager = Pager(source, Slab(LAYOUT, 4))
    lease = pager.acquire(["alice"])
    pager.prefetch(["bob"])
    pager.close()
    pager.close()
    for refused in (pager.acquire, pager.prefetch):
        with pytest.raises(RuntimeError, match="closed"):
            refused(["alice"])
    lease.release()
    assert idle(pager)


def test_without_the_compiled_part(source, monkeypatch):
    module = import_module("loraxs_ext.store.pager")
    monkeypatch.setattr(module, "import_module", lambda name: object())
    with pytest.raises(ImportError, match="needs the compiled part of loraxs_ext.*pip install"):
        Pager(source, Slab(LAYOUT, 4))


def test_a_slab_somewhere_else(source):
    with pytest.raises(ValueError, match="expected one on the CPU or a CUDA device, got meta"):
        Pager(source, Slab(LAYOUT, 4, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_threads_with_more_adapters_than_slots(dtype):
    slots, rounds, threads = 10, 150, 8
    source = MemorySource()
    names = [f"adapter {i}" for i in range(30)]
    failing = threading.Event()

    def flaky(name: str) -> None:
        if failing.is_set() and name == names[0]:
            raise ValueError("torn record")

    source.before_row = flaky
    problems: list[str] = []
    served = [0] * threads
    with Pager(source, Slab(LAYOUT, slots, dtype)) as pager:

        def work(number: int) -> None:
            choose = random.Random(number)
            for _ in range(rounds):
                count = slots if choose.random() < 0.1 else choose.choice([1, 1, 2])
                some = [choose.choice(names) if choose.random() < 0.9 else None for _ in range(count)]
                if choose.random() < 0.2:
                    source.replace(choose.choice(names))
                if choose.random() < 0.2:
                    failing.set() if choose.random() < 0.5 else failing.clear()
                if choose.random() < 0.5:
                    pager.prefetch([name for name in some if name is not None])
                asked = {name: source.version(name) for name in some if name is not None}
                try:
                    lease = pager.acquire(some, timeout=None if choose.random() < 0.8 else 0.002)
                except TimeoutError:
                    continue
                except RuntimeError as error:
                    if "torn record" not in str(error):
                        problems.append(str(error))
                    continue
                with lease:
                    before = pager.slab.rows[[slot for slot in lease.slots if slot >= 0]].clone()
                    time.sleep(0.0005)
                    after = pager.slab.rows[[slot for slot in lease.slots if slot >= 0]]
                    if not torch.equal(before, after):
                        problems.append("a leased row changed")
                    for name, slot in zip(some, lease.slots, strict=True):
                        if name is None:
                            if slot != -1:
                                problems.append(f"the base model got slot {slot}")
                            continue
                        # The version is one that was current at some time during the call.
                        could_be = range(asked[name], source.version(name) + 1)
                        if not any(holds(pager, slot, name, version) for version in could_be):
                            problems.append(f"slot {slot} does not hold {name}")
                    served[number] += 1

        workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(2 * LONG)
        assert not any(worker.is_alive() for worker in workers)
        assert problems == []
        assert min(served) > rounds // 4
        failing.clear()
        until(lambda: idle(pager))
        stats = pager.stats()
        assert stats["evictions"] > 100 and stats["waits"] > 10 and stats["prefetches"] > 10 and stats["failures"] > 0
        # No slot was lost.
        with pager.acquire(names[:slots], timeout=LONG) as lease:
            assert sorted(lease.slots) == list(range(slots))
