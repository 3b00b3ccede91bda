"""Many inside, or one alone."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Gate:
    """A lock that any number of threads share, or one has alone. Who waits to be alone goes before who comes to share.

    A thread that shares it may share it again, and must not ask to be alone.

    Every thread has a lock of its own, and who is alone has all of them: a lock that an interrupt cannot leave locked,
    as it can leave a count or a `threading.Condition`, which are kept in Python.
    """

    def __init__(self) -> None:
        # RLocks, because they know whose they are. Held by who is alone, or wants to be; and for a first time inside.
        self._turn: Any = threading.RLock()
        self._own = threading.local()
        self._locks: weakref.WeakSet[Any] = weakref.WeakSet()
        self._wanted = False

    def shared(self) -> Any:
        """A context manager: be inside together with others."""
        lock = getattr(self._own, "lock", None)
        if lock is None:
            with self._turn:
                lock = threading.RLock()
                self._locks.add(lock)
            self._own.lock = lock
        elif self._wanted and not lock._is_owned():
            with self._turn:
                pass
        return lock

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside with nobody else."""
        if self._is_inside():
            raise RuntimeError("a thread that is inside a gate cannot ask to be alone there")
        try:
            self.enter_alone()
            yield
        finally:
            self.leave_alone()

    def enter_alone(self, timeout: float | None = None) -> bool:
        """Wait until nobody is inside, and keep others out until `leave_alone`, which is for the same thread to call.

        Args:
            timeout: seconds to wait; None for any time.

        Returns:
            Whether this thread is alone inside now; False at once for a thread that shares the gate already.
        """
        if self._is_inside():
            return False
        deadline = None if timeout is None else time.monotonic() + timeout
        self._wanted = True
        entered = False
        try:
            entered = _acquire(self._turn, deadline)
            self._wanted = True  # Whoever was alone before took it back.
            entered = entered and all([_acquire(lock, deadline) for lock in list(self._locks)])
        finally:
            if not entered:
                self.leave_alone()
        return entered

    def leave_alone(self) -> None:
        """Let others in again."""
        try:
            self._let_go()
        except BaseException:
            # Interrupted, and not done.
            self._let_go()
            raise

    def _let_go(self) -> None:
        self._wanted = False
        # None of the locks is taken before the turn, nor is one added by another thread while this one has it.
        if self._turn._is_owned():
            for lock in self._locks:
                if lock._is_owned():
                    lock.release()
            self._turn.release()

    def _is_inside(self) -> bool:
        lock = getattr(self._own, "lock", None)
        return lock is not None and lock._is_owned()


def _acquire(lock: Any, deadline: float | None) -> bool:
    return lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic()))
