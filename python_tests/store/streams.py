"""Streams and events that compute nothing but know, as vector clocks, what is ordered after what."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import torch

_LOCK = threading.RLock()
_HANDLES = count(1)

# Stream -> how many of its steps are known to have run.
Clock = Counter


def reached(clock: Clock, needed: Clock) -> bool:
    return all(clock[stream] >= steps for stream, steps in needed.items())


class Stream:
    """Steps run in order; `known` is what has run before the next step does."""

    def __init__(self, device: object = None) -> None:
        self.cuda_stream = next(_HANDLES)
        self.known: Clock = Clock()

    def step(self) -> Clock:
        """Queue some work; the clock of its end."""
        with _LOCK:
            self.known[self.cuda_stream] += 1
            return self.known.copy()

    def wait_event(self, event: Event) -> None:
        with _LOCK:
            self.known |= event.clock

    def wait_stream(self, stream: Stream) -> None:
        with _LOCK:
            self.known |= stream.known

    def synchronize(self) -> None:
        HOST.known |= self.known


class Event:
    """The end of what a stream was given before `record`. Never known to be over: `query` answers as asked."""

    over = False

    def __init__(self) -> None:
        self.clock: Clock = Clock()

    def record(self, stream: Stream) -> None:
        self.clock = stream.step()

    def query(self) -> bool:
        # Over for one is over for all: whatever starts later comes after it.
        if Event.over:
            with _LOCK:
                for stream in STREAMS.values():
                    stream.known |= self.clock
        return Event.over

    def synchronize(self) -> None:
        HOST.known |= self.clock


HOST = Stream()
STREAMS: dict[str, Stream] = {}
_CURRENT = threading.local()


def current_stream(device: object = None) -> Stream:
    return getattr(_CURRENT, "stream", None) or STREAMS["compute"]


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    before = getattr(_CURRENT, "stream", None)
    _CURRENT.stream = stream
    try:
        yield
    finally:
        _CURRENT.stream = before


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.cuda's streams be these."""
    HOST.known.clear()
    STREAMS.clear()
    STREAMS.update(compute=Stream(), other=Stream())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Event, "over", False)
