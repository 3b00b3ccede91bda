"""Many inside, or one alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from loraxs_ext.store.gate import Gate

LONG = 30.0  # seconds; only a broken gate takes as long


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_many_share_it_and_one_again():
    gate, both = Gate(), threading.Barrier(2, timeout=LONG)

    def share() -> None:
        with gate.shared(), gate.shared():
            both.wait()

    thread = in_thread(share)
    share()
    thread.join(LONG)
    with gate.alone():
        pass


def test_who_is_inside_cannot_be_alone():
    gate = Gate()
    with gate.shared():
        assert not gate.enter_alone(0.0)
        with pytest.raises(RuntimeError, match="cannot ask to be alone"), gate.alone():
            pass
        assert not gate.enter_alone(0.0)  # Still inside.
    assert gate.enter_alone(0.0)
    gate.leave_alone()


def test_one_waits_for_the_others_and_keeps_them_out():
    gate, inside, go_on = Gate(), threading.Event(), threading.Event()
    order: list[str] = []

    def share() -> None:
        with gate.shared():
            inside.set()
            go_on.wait(LONG)
            order.append("shared")

    first = in_thread(share)
    assert inside.wait(LONG)
    assert not gate.enter_alone(0.01)
    with gate.shared():  # What was in vain is forgotten.
        pass
    go_on.set()
    with gate.alone():
        order.append("alone")
        second = in_thread(share)
        time.sleep(0.05)
        order.append("still alone")
    for thread in (first, second):
        thread.join(LONG)
    assert order == ["shared", "alone", "still alone", "shared"]


def test_one_at_a_time_is_alone_among_busy_threads():
    gate, end = Gate(), threading.Event()
    count = {"alone": 0}
    problems: list[str] = []

    def share() -> None:
        while not end.is_set():
            with gate.shared():
                if count["alone"]:
                    problems.append("inside while another is alone")

    def alone() -> None:
        for _ in range(50):
            with gate.alone():
                count["alone"] += 1
                if count["alone"] != 1:
                    problems.append("two are alone")
                time.sleep(0.0002)
                count["alone"] -= 1

    busy = [in_thread(share) for _ in range(4)]
    lonely = [in_thread(alone) for _ in range(2)]
    for thread in lonely:
        thread.join(LONG)
        assert not thread.is_alive()
    end.set()
    for thread in busy:
        thread.join(LONG)
    assert problems == []
