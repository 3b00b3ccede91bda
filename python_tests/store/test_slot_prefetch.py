"""What is loaded ahead: which slots it may take, and what it must leave alone."""

from __future__ import annotations

import pytest

from .tables import LONG, SlotTable, acquire, in_thread, load, load_waiting, prefetch, touch, until


def test_it_takes_free_slots_and_cold_ones():
    table = SlotTable(3)
    touch(table, "a", "b")
    (held,) = load(table, ("b", 1))
    ((slots, to_load, loading),) = prefetch(table, ["b", "c", "d", "e"])
    assert to_load == [1, 2] and loading == [] and slots[0] == slots[3] == -1  # a was evicted, b is here
    assert held not in slots
    table.loaded(slots[1:3], [1, 1])
    table.release(slots)
    assert table.stats()["prefetches"] == 2
    # What an earlier prefetch brought stays for whom it was brought.
    assert prefetch(table, ["f"]) == []
    assert acquire(table, ("c", 1)) == ([slots[1]], [], [])
    table.release([slots[1]])
    # A request may take it.
    assert touch(table, "f") == [slots[2]]


def test_it_keeps_what_is_here_already():
    table = SlotTable(2)
    slots = touch(table, "a", "b")
    assert prefetch(table, ["a"]) == []
    assert touch(table, "c") == [slots[1]]


def test_it_does_not_take_the_place_of_what_it_is_asked_for():
    table = SlotTable(2)
    slots = touch(table, "a", "b")
    assert prefetch(table, ["c", "a"]) == [([slots[1], -1], [0], [])]


def test_it_does_not_overtake():
    table = SlotTable(2)
    load(table, ("a", 1))
    thread = in_thread(lambda: load_waiting(table, [("b", 1), ("c", 1)]))
    until(lambda: table.stats()["waiting"] == 1)
    assert prefetch(table, ["d"]) == []
    table.release([0])
    thread.join(LONG)


def test_it_of_the_same_name_twice_loads_once():
    table = SlotTable(2)
    ((_, to_load, _),) = prefetch(table, ["a", "a"])
    assert to_load == [0]


def test_it_in_portions():
    table = SlotTable(5)
    touch(table, "b")
    first, second = prefetch(table, list("abcde"), portion=3)
    assert [to_load for _, to_load, _ in (first, second)] == [[0, 2, 3], [4]]
    assert sorted(slot for slots, _, _ in (first, second) for slot in slots if slot >= 0) == [1, 2, 3, 4]
    assert all((slots[i] >= 0) == (i in to_load) for slots, to_load, _ in (first, second) for i in range(5))


@pytest.mark.parametrize("next_user", ["a", "b"], ids=["it was asked for", "it was evicted"])
def test_what_was_brought_ahead_is_in_the_way_only_until_then(next_user):
    table = SlotTable(1)
    ((slots, _, _),) = prefetch(table, ["a"])
    table.loaded(slots, [1])
    table.release(slots)
    assert prefetch(table, ["c"]) == []
    assert touch(table, next_user) == slots
    assert prefetch(table, ["c"]) == [(slots, [0], [])]


def test_the_next_version_may_take_the_slot_of_a_pinned_one():
    table = SlotTable(1)
    table.pin("a")
    slots = touch(table, "a")
    assert prefetch(table, ["b"]) == []
    assert prefetch(table, ["a"], version=2) == [(slots, [0], [])]
