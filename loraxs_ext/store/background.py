"""Threads that work beside whoever gives them something to do."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

_Line = queue.SimpleQueue  # type: ignore[type-arg]


class Background:
    """Threads that run what is put in line for them, until `close`.

    Ctrl-C within `put` does no harm. In concurrent.futures it may: its locks, and those of a thread that starts, are
    taken in Python, where an interrupt leaves them locked, and then its threads wait for ever.

    Args:
        threads: how many; they begin now.
        name: of the threads, with a number.
    """

    def __init__(self, threads: int, name: str) -> None:
        line: _Line = queue.SimpleQueue()
        workers = [
            threading.Thread(target=_work, args=(line,), name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for worker in workers:
            worker.start()
        self._line = line
        # Also when this is dropped, and when the interpreter ends.
        self._end = weakref.finalize(self, _end, line, workers)

    def put(self, task: Callable[[], object]) -> None:
        """Let a thread call `task`, which must not raise."""
        self._line.put(task)

    def close(self) -> None:
        """Return when all that is in line is done and the threads have ended."""
        self._end()


def _work(line: _Line) -> None:
    while (task := line.get()) is not None:
        task()
        # While it waits, a thread must not keep alive what the last task belonged to.
        del task


def _end(line: _Line, workers: list[threading.Thread]) -> None:
    for _ in workers:
        line.put(None)
    for worker in workers:
        # The last reference may have been that of a task.
        if worker is not threading.current_thread():
            worker.join()
