"""The slot table against a model in a few lines of Python, its line of waiting threads, and its use by many threads."""

from __future__ import annotations

import _thread
import random
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from ..ops.simt import build
from .tables import LONG, SlotTable, acquire, in_thread, load, load_waiting, native, resident, touch, until


def test_an_adapter_is_loaded_once_and_found_again():
    table = SlotTable(2)
    slots, to_load, loading = acquire(table, ("a", 1), ("b", 1), ("a", 1))
    assert to_load == [0, 1] and loading == [] and slots[0] == slots[2] != slots[1]
    table.loaded(slots[:2], [1, 1])
    assert acquire(table, ("b", 1)) == ([slots[1]], [], [])
    table.release([slots[1]])
    table.release(slots)
    assert table.stats() | {"wait_seconds": 0} == dict(
        slots=2, free=0, resident=2, in_use=0, pinned=0, loading=0, waiting=0,
        hits=2, misses=2, evictions=0, prefetches=0, failures=0, waits=0, timeouts=0, wait_seconds=0,
    )  # fmt: skip


def test_the_least_recently_used_goes_first():
    table = SlotTable(3)
    slots = touch(table, "a", "b", "c")
    touch(table, "a")
    assert touch(table, "d") == [slots[1]]
    assert touch(table, "e") == [slots[2]]
    assert touch(table, "a") == [slots[0]]


def test_a_slot_in_use_is_never_given_away():
    table = SlotTable(2)
    (held,) = load(table, ("a", 1))
    for name in "bcdefg":
        assert touch(table, name) != [held]
    assert acquire(table, ("a", 1)) == ([held], [], [])


def test_superseded_versions_go_first():
    table = SlotTable(3)
    old = load(table, ("a", 1))
    touch(table, "b")
    new = load(table, ("a", 2))
    assert new != old
    table.release(old)
    table.release(new)
    assert touch(table, "c") == old  # though b was used less recently
    assert resident(table, "a", version=2) == ["a"]


def test_a_pinned_adapter_stays_and_its_successor_inherits_the_pin():
    table = SlotTable(2)
    old = touch(table, "a")
    table.pin("a")
    touch(table, "b", "c", "d")
    assert acquire(table, ("a", 1))[:2] == (old, [])
    table.release(old)
    new = load(table, ("a", 2))
    table.release(new)
    assert table.stats()["pinned"] == 1
    assert new == old and not set(new) & set(touch(table, "e", "f", "g"))  # its forerunner was the first to go
    table.unpin("a")
    assert new[0] in touch(table, "h", "i")


def test_a_pin_does_not_stand_in_the_way_of_the_next_version():
    table = SlotTable(1)
    old = touch(table, "a")
    table.pin("a")
    with pytest.raises(TimeoutError, match="0 of 1 slots could be given away"):
        acquire(table, ("b", 1))
    assert load(table, ("a", 2)) == old


def test_a_row_may_turn_out_to_be_of_a_newer_version():
    table = SlotTable(2)
    slots, _, _ = acquire(table, ("a", 1))
    table.loaded(slots, [2])
    assert acquire(table, ("a", 2)) == (slots, [], [])
    assert acquire(table, ("a", 1))[1] == [0]


def test_all_or_none():
    table = SlotTable(3)
    held = load(table, ("a", 1))
    with pytest.raises(TimeoutError):
        acquire(table, ("b", 1), ("c", 1), ("d", 1))
    assert table.stats()["free"] == 2 and table.stats()["in_use"] == 1
    # A resident adapter of the batch must not be evicted for another of the same batch.
    table.release(held)
    slots = load(table, ("b", 1), ("c", 1), ("a", 1))
    assert slots[2] == held[0] and len(set(slots)) == 3


def test_more_adapters_than_slots():
    table = SlotTable(2)
    with pytest.raises(ValueError, match="got 3 for 2 slots"):
        acquire(table, ("a", 1), ("b", 1), ("a", 2))
    assert len(acquire(table, ("a", 1), ("b", 1), ("a", 1), ("b", 1))[0]) == 4


def test_another_thread_waits_for_a_load():
    table = SlotTable(2)
    slots, _, _ = acquire(table, ("a", 1))
    assert acquire(table, ("a", 1)) == (slots, [], [0])
    with pytest.raises(TimeoutError, match="another thread is loading"):
        table.wait(slots, 0.0)
    seen = []
    thread = in_thread(lambda: seen.append(table.wait(slots)))
    assert not seen
    table.loaded(slots, [1])
    thread.join(LONG)
    assert seen == [None]


def test_a_failed_load_is_told_to_who_waits_and_tried_anew():
    table = SlotTable(1)
    slots, _, _ = acquire(table, ("a", 1))
    acquire(table, ("a", 1))
    table.failed(slots, "no such thing")
    table.release(slots)
    with pytest.raises(RuntimeError, match="^no such thing$"):
        table.wait(slots)
    with pytest.raises(TimeoutError):  # somebody still has to hear of it
        acquire(table, ("a", 1))
    table.release(slots)
    assert acquire(table, ("a", 1)) == (slots, [0], [])
    assert table.stats()["failures"] == 1


def test_what_is_loaded_already_does_not_fail():
    table = SlotTable(2)
    slots, _, _ = acquire(table, ("a", 1), ("b", 1))
    table.loaded(slots[:1], [1])
    table.failed(slots, "no")
    assert table.stats()["failures"] == 1
    table.release(slots)
    assert acquire(table, ("a", 1), ("b", 1))[1] == [1]


def test_first_come_first_served():
    table = SlotTable(4)
    held = [slot for name in "abcd" for slot in load(table, (name, 1))]
    order: list[str] = []

    def request(label: str, *keys: tuple[str, int]) -> None:
        slots = load_waiting(table, keys)
        order.append(label)
        table.release(slots)

    big = in_thread(lambda: request("big", *((name, 1) for name in "efgh")))
    until(lambda: table.stats()["waiting"] == 1)
    small = in_thread(lambda: request("small", ("i", 1)))
    until(lambda: table.stats()["waiting"] == 2)
    resident_one = in_thread(lambda: request("resident", ("a", 1)))
    until(lambda: table.stats()["waiting"] == 3)
    for slot in held[1:]:
        table.release([slot])
        with pytest.raises(TimeoutError, match="3 requests are ahead"):
            acquire(table, ("a", 1))
        assert order == []
    table.release(held[:1])
    for thread in (big, small, resident_one):
        thread.join(LONG)
    assert order[0] == "big" and sorted(order) == ["big", "resident", "small"]
    assert table.stats()["waits"] == 3 + 3 and table.stats()["timeouts"] == 3 and table.stats()["wait_seconds"] > 0


def test_who_gives_up_lets_the_next_through():
    table = SlotTable(2)
    load(table, ("a", 1))
    done = threading.Event()

    def small() -> None:
        load_waiting(table, [("d", 1)])
        done.set()

    def big() -> None:
        with pytest.raises(TimeoutError):
            acquire(table, ("b", 1), ("c", 1), timeout=0.3)

    first = in_thread(big)
    until(lambda: table.stats()["waiting"] == 1 or not first.is_alive())
    in_thread(small)
    assert done.wait(LONG)
    first.join(LONG)
    assert table.stats()["waiting"] == 0


def test_close_wakes_everybody():
    table = SlotTable(1)
    slots, _, _ = acquire(table, ("a", 1))
    errors: list[str] = []

    def ask(action: Callable[[], object]) -> None:
        try:
            action()
        except RuntimeError as error:
            errors.append(str(error))

    threads = [in_thread(lambda: ask(lambda: acquire(table, ("b", 1), timeout=None))) for _ in range(3)]
    threads.append(in_thread(lambda: ask(lambda: table.wait(slots))))
    until(lambda: table.stats()["waiting"] == 3)
    table.close()
    for thread in threads:
        thread.join(LONG)
    assert sorted(errors) == 3 * ["acquire: the slot table is closed"] + ["wait: the slot table is closed"]
    for refused in (table.acquire, partial(table.prefetch, portion=1)):
        with pytest.raises(RuntimeError, match="closed"):
            refused(["a"], [1])
    table.loaded(slots, [1])
    table.release(slots)
    assert table.stats()["in_use"] == 0


@pytest.fixture
def interruptible(request):
    """A shell that starts a job in the background lets it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))


def test_a_signal_ends_a_wait(interruptible):
    table = SlotTable(1)
    load(table, ("a", 1))
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        acquire(table, ("b", 1), timeout=LONG)
    timer.join()
    assert table.stats()["waiting"] == 0


class TestHold:
    def test_one_that_nobody_has_is_given_back(self):
        table = SlotTable(1)
        acquire(table, ("a", 1))
        waiting = acquire(table, ("a", 1))[0]
        del table.holds[0]  # without a word of what became of its load
        with pytest.raises(RuntimeError, match="^loading was interrupted$"):
            table.wait(waiting)
        table.release(waiting)
        assert acquire(table, ("b", 1)) == ([0], [0], [])

    def test_is_given_back_once(self):
        table = SlotTable(1)
        load(table, ("a", 1))
        load(table, ("a", 1))
        hold = table.holds[0]
        assert hold.held
        for _ in range(2):
            hold.release()
            assert not hold.held and hold.slots == [0]
            assert table.stats()["in_use"] == 1

    def test_tells_who_waits_why(self):
        table = SlotTable(2)
        acquire(table, ("a", 1), ("b", 1))
        slots = acquire(table, ("a", 1), ("b", 1))[0]
        table.loaded(slots[:1], [1])
        table.holds[0].release("no more")
        table.wait(slots[:1])
        with pytest.raises(RuntimeError, match="^no more$"):
            table.wait(slots)

    def test_outlives_its_table(self):
        table = native.SlotTable(1)
        hold = table.acquire(["a"], [1])
        del table
        assert hold.slots == [0]
        hold.release()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda t: t.loaded([0], [1]), "loaded: slots: expected slots in use, got 0"),
        (lambda t: t.loaded([0], []), "loaded: versions: expected 1, got 0"),
        (lambda t: t.loaded(load(t, ("a", 1)), [1]), "loaded: slots: expected slots being loaded, got 0"),
        (lambda t: t.failed([0], ""), "failed: slots: expected slots in use, got 0"),
        (lambda t: t.acquire(["a"], []), "versions: expected 1, got 0"),
        (lambda t: t.loaded([2], [1]), "loaded: slots: expected 0 to 1, got 2"),
        (lambda t: t.failed([-1], ""), "failed: slots: expected 0 to 1, got -1"),
        (lambda t: t.prefetch(["a"], [1], 0), "portion: expected at least 1, got 0"),
        (lambda t: t.acquire(["a"], [1], -1.0), "timeout: expected seconds, 0 or more, got -1"),
        (lambda t: t.acquire(["a"], [1], float("nan")), "timeout: expected seconds, 0 or more, got"),
        (lambda t: SlotTable(0), "slots: expected at least 1, got 0"),
    ],
)
def test_misuse(action, message):
    with pytest.raises(ValueError, match=message):
        action(SlotTable(2))


class Model:
    """What one thread may expect of a table, said in another way: sets and a clock instead of lists and links."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.used: Counter[tuple[str, int]] = Counter()
        self.when: dict[tuple[str, int], int] = {}  # residents, and when they were last released
        self.current: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.clock = 0

    def evictable(self) -> list[tuple[str, int]]:
        """In the order in which they go."""
        idle = [key for key in self.when if not self.used[key]]
        stale = [key for key in idle if self.current.get(key[0]) != key[1]]
        cold = [key for key in idle if key not in stale and key[0] not in self.pinned]
        return sorted(stale, key=self.since) + sorted(cold, key=self.since)

    def since(self, key: tuple[str, int]) -> int:
        return self.when[key]

    def become_stale(self, name: str) -> None:
        # A slot that leaves the other list, or a pin, joins the end of this one.
        version = self.current.pop(name, None)
        if version is not None and not self.used[name, version] and (name, version) in self.when:
            self.tick((name, version))

    def tick(self, key: tuple[str, int]) -> None:
        self.clock += 1
        self.when[key] = self.clock

    def acquire(self, keys: list[tuple[str, int]]) -> list[int] | None:
        """The positions to load; None if there are not enough slots."""
        for name, version in keys:
            if (name, version) not in self.when and self.current.get(name) != version:
                self.become_stale(name)
        absent = list(dict.fromkeys(key for key in keys if key not in self.when))
        free = self.slots - len(self.when)
        victims = [key for key in self.evictable() if key not in keys]
        if len(absent) > free + len(victims):
            return None
        for key in keys:
            if key in self.when:
                self.used[key] += 1
                self.set_current(key)
        to_load = []
        for i, key in enumerate(keys):
            if key in absent and key not in self.when:
                if len(self.when) == self.slots:
                    gone = self.evictable()[0]
                    del self.when[gone]
                    if self.current.get(gone[0]) == gone[1]:
                        del self.current[gone[0]]
                self.when[key] = 0
                self.set_current(key)
                to_load.append(i)
            if key in absent:
                self.used[key] += 1
        return to_load

    def set_current(self, key: tuple[str, int]) -> None:
        if self.current.get(key[0]) != key[1]:
            self.become_stale(key[0])
            self.current[key[0]] = key[1]

    def release(self, keys: list[tuple[str, int]]) -> None:
        for key in keys:
            self.used[key] -= 1
            if not self.used[key]:
                self.tick(key)

    def pin(self, name: str) -> None:
        self.pinned.add(name)

    def unpin(self, name: str) -> None:
        if name in self.pinned:
            self.pinned.discard(name)
            if name in self.current and not self.used[name, self.current[name]]:
                self.tick((name, self.current[name]))


@pytest.mark.parametrize("seed", range(8))
def test_as_the_model_says(seed):
    choose = random.Random(seed)
    size = choose.choice([1, 2, 3, 5, 8])
    table, model = SlotTable(size), Model(size)
    leases: list[tuple[list[tuple[str, int]], list[int]]] = []
    slot_of: dict[int, tuple[str, int]] = {}
    refused = 0
    for _ in range(3000):
        action = choose.random()
        name = choose.choice("abcdefghij")
        if action < 0.04:
            table.pin(name)
            model.pin(name)
        elif action < 0.12:
            table.unpin(name)
            model.unpin(name)
        elif action < 0.5 and leases:
            keys, slots = leases.pop(choose.randrange(len(leases)))
            table.release(slots)
            model.release(keys)
        else:
            count = choose.randint(1, size)
            keys = [(choose.choice("abcdefghij"), choose.choice([1, 1, 1, 2])) for _ in range(count)]
            expected = model.acquire(keys)
            if expected is None:
                refused += 1
                with pytest.raises(TimeoutError):
                    acquire(table, *keys)
                continue
            slots, to_load, loading = acquire(table, *keys)
            assert (to_load, loading) == (expected, [])
            for i in to_load:
                slot_of[slots[i]] = keys[i]
            table.loaded([slots[i] for i in to_load], [keys[i][1] for i in to_load])
            assert [slot_of[slot] for slot in slots] == keys
            leases.append((keys, slots))
        stats = table.stats()
        in_use = len({slot for _, slots in leases for slot in slots})
        assert (stats["resident"], stats["in_use"]) == (len(model.when), in_use)
        assert stats["pinned"] == sum(name in model.pinned for name in model.current)
    assert refused > 10 and table.stats()["evictions"] > 50


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_many_threads_under_a_sanitizer(sanitizer, tmp_path):
    program = build("slot_table_stress.cpp", tmp_path / "stress", f"-fsanitize={sanitizer}", "-pthread")
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr
