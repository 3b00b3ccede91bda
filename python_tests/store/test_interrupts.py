"""Ctrl-C at any point of a pager or a store: no slot is lost and nothing waits for ever."""

from __future__ import annotations

import dis
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from loraxs_ext.store import Pager, Slab

from .sources import LAYOUT, MemorySource
from .test_pager import LONG, holds, idle, until

ROOT = Path(__file__).parents[2]
# After these, CPython looks whether there was a signal.
LISTENING = ("CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME")
OURS = ("store/pager.py", "store/background.py", "store/transfer.py")


def interrupted_at(step: int, action: Callable[[], object]) -> KeyboardInterrupt | None:
    """Run `action`, with a Ctrl-C at the `step`th moment in our code when Python listens; None if it ends before."""
    left = step

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        last = None

        def at(frame, event, argument):
            nonlocal left, last
            if event == "opcode":
                left -= last in LISTENING
                last = dis.opname[frame.f_code.co_code[frame.f_lasti]]
                if left == 0:
                    left = -1
                    raise KeyboardInterrupt
            return at

        return at

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(before)
    return None


def acquire_and_release(pager: Pager, names: list[str]) -> None:
    pager.acquire(names).release()


def in_a_block(pager: Pager, names: list[str]) -> None:
    with pager.acquire(names) as lease:
        assert len(lease.slots) == len(names)


@pytest.mark.parametrize(
    "action", [Pager.acquire, Pager.prefetch, acquire_and_release, in_a_block], ids=lambda action: action.__name__
)
def test_at_every_moment(action, monkeypatch):
    source = MemorySource()
    # An interrupt in a finaliser is printed, and what is printed is kept.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    with Pager(source, Slab(LAYOUT, 2)) as pager, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        step, ended = 0, 0
        # An interrupt in a finaliser does not come through, so that one call that ends well proves nothing.
        while ended < 50:
            step += 1
            error = interrupted_at(step, partial(action, pager, [f"a{step}", f"b{step}"]))
            ended = 0 if error else ended + 1
            if action not in (Pager.acquire, Pager.prefetch):
                error = None  # It keeps the lease, as anybody may.
            until(lambda: idle(pager))
            with pager.acquire(["x", "y"], timeout=LONG) as lease:
                assert holds(pager, lease.slots[0], "x") and holds(pager, lease.slots[1], "y")
            del error
        assert step > 70


@pytest.mark.parametrize("action", ["acquire", "prefetch", "store"])
def test_by_real_signals(action):
    if action == "store":
        pytest.importorskip("lmdb")
    command = [sys.executable, "-m", "python_tests.store.interrupted", action]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 200
