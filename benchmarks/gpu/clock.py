"""How long a call takes on a device: CUDA events, graphs for what a server would replay; a CPU clock for dry runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall seconds of a call that decides on the host and computes on the device, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


class Timed(NamedTuple):
    """What one provider runs: `run()` goes through all sets of weights; `outputs` are what the last one wrote."""

    run: Callable[[], Any]
    outputs: Callable[[], tuple[Tensor, ...]]


class Clock(Protocol):
    """Times a call that may be asynchronous."""

    def seconds(self, call: Callable[[], Any], repeat: int) -> float:
        """Seconds for `repeat` calls in a row."""

    def record(self, calls: Sequence[Call], graph: bool) -> Timed:
        """Prepare one call per set of weights for timing, as one CUDA graph if `graph`."""


class CpuClock:
    """Stands in where there is no device; its readings are never reported."""

    def seconds(self, call: Callable[[], Any], repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return time.perf_counter() - start

    def record(self, calls: Sequence[Call], graph: bool) -> Timed:
        return _eager(calls)


class CudaClock:
    """Device events around the calls, on the current stream."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, call: Callable[[], Any], repeat: int) -> float:
        self._begin.record()
        for _ in range(repeat):
            call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3

    def record(self, calls: Sequence[Call], graph: bool) -> Timed:
        # Compiles kernels and makes library handles, neither of which may happen in a capture or be timed.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in (calls[0], *calls):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if not graph:
            return _eager(calls)
        captured = torch.cuda.CUDAGraph()
        outputs: tuple[Tensor, ...] = ()
        with torch.cuda.graph(captured):
            for call in calls:
                outputs = call()

        def replay_over_poison() -> tuple[Tensor, ...]:
            # The captured outputs always lie in the same memory: what a replay leaves unwritten stays NaN.
            for output in outputs:
                output.fill_(torch.nan)
            captured.replay()
            return outputs

        return Timed(captured.replay, replay_over_poison)


def _eager(calls: Sequence[Call]) -> Timed:
    def run() -> None:
        for call in calls:
            call()

    return Timed(run, calls[-1])
