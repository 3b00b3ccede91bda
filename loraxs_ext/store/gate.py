"""Many inside, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """A lock that any number of threads share, or one has alone. Who waits to be alone goes before who comes to share.

    A thread that shares it may share it again, and must not ask to be alone.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Be inside together with others."""
        me = threading.get_ident()
        with self._changed:
            while self._alone and me not in self._inside:
                self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside with nobody else."""
        if not self.enter_alone():
            raise RuntimeError("a thread that is inside a gate cannot ask to be alone there")
        try:
            yield
        finally:
            self.leave_alone()

    def enter_alone(self, timeout: float | None = None) -> bool:
        """Wait until nobody is inside, and keep others out until `leave_alone`.

        Args:
            timeout: seconds to wait; None for any time.

        Returns:
            Whether this thread is alone inside now; False at once for a thread that shares the gate already.
        """
        with self._changed:
            if threading.get_ident() in self._inside:
                return False
            if not self._changed.wait_for(lambda: not self._alone, timeout):
                return False
            self._alone = True
            if self._changed.wait_for(lambda: not self._inside, timeout):
                return True
            self._alone = False
            self._changed.notify_all()
            return False

    def leave_alone(self) -> None:
        """Let others in again."""
        with self._changed:
            self._alone = False
            self._changed.notify_all()
