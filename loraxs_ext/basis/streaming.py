"""Weights on their way to where they are decomposed: loaded, dequantised and copied while others are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
_END: Any = object()

# Weights of one shape that are decomposed together, in bytes of the dtype of the decomposition. More of them hide the
# launches of an accelerator better, up to a point (a model, not measured). On a CPU they share the calls of the small
# steps, until they outgrow the caches: four of 1024 × 1024 take three quarters of the time of one by one.
_CHUNK_BYTES, _CPU_CHUNK_BYTES = 4 << 30, 16 << 20
# The next chunk, the iteration's own vectors and an fp64 copy for what fp32 does not resolve have to fit as well.
_SHARE_OF_FREE_MEMORY = 8


def prefetched(items: Iterable[Item]) -> Iterator[Item]:
    """The same items in the same order, each made by a thread while the caller works on the one before.

    Never more than one item ahead. All items are made by the same thread, one after the other; what making one raises
    is raised here, in its turn.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="loraxs-prefetch") as worker:
        ahead = worker.submit(next, source, _END)
        while (item := ahead.result()) is not _END:
            ahead = worker.submit(next, source, _END)
            yield item
            # The caller is done with it; nothing may keep it alive while the next one is waited for.
            del item


def chunk_bytes(device: torch.device) -> int:
    """Bytes of weights to decompose together on `device`."""
    if device.type == "cpu":
        return _CPU_CHUNK_BYTES
    if device.type != "cuda":
        return _CHUNK_BYTES // _SHARE_OF_FREE_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    # What torch's allocator holds but does not use is free for us too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_CHUNK_BYTES, free // _SHARE_OF_FREE_MEMORY)


class Stack(NamedTuple):
    """Weights of one shape as [b, N, K] on the device of the decomposition.

    Attributes:
        values: the weights; on CUDA valid for a stream only after it has waited for `ready`.
        ready: event of the copies; None where they are finished.
    """

    values: Tensor
    ready: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The weights, for use on the current stream."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.values.device)
            stream.wait_event(self.ready)
            # Allocated on another stream: the allocator must not reuse the memory before this one is done with it.
            self.values.record_stream(stream)
        return self.values


class Stager:
    """Gathers weights of one shape into one tensor on a device.

    With `overlap`, a CUDA device does this on a stream of its own, and what lies on the host passes through pinned
    memory, which is the only kind that is copied while kernels run: two buffers, one filled while the other is sent.
    What is made for the stager alone, as by a dequantising function, then has to be made inside `running`.

    Args:
        device: of the stacks.
        overlap: with what the caller's stream computes; without effect on other devices.
        reuse: make one stack after the other in the same memory, so that a stack is gone when the next one is made.
    """

    def __init__(self, device: torch.device, *, overlap: bool = False, reuse: bool = False) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._reuse = reuse
        self._room: Tensor | None = None
        self._buffers: list[tuple[Tensor, torch.cuda.Event] | None] = [None, None]
        self._turn = 0
        if overlap and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # The weights themselves may still be on their way on the caller's stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which kernels run on this stager's stream, and memory is allocated for it."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @torch.no_grad()
    def stack(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Stack:
        """The weights, each [N, K] and on any device, as [b, N, K] of `dtype`; a single one on its place as it is."""
        if self._stream is None:
            if len(weights) == 1:
                return Stack(weights[0].to(self.device, dtype)[None], None)
            if self._reuse:
                values = self._make_room(len(weights), weights[0].shape, dtype)
                for place, weight in zip(values, weights, strict=True):
                    place.copy_(weight)
                return Stack(values, None)
            return Stack(torch.stack([weight.to(self.device, dtype) for weight in weights]), None)
        with self.running():
            values = torch.empty(len(weights), *weights[0].shape, dtype=dtype, device=self.device)
            for place, weight in zip(values, weights, strict=True):
                if weight.device.type == "cpu":
                    self._send(weight, place)
                else:
                    place.copy_(weight)
            ready = torch.cuda.Event()
            ready.record()
        return Stack(values, ready)

    def _make_room(self, count: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """[count, N, K], from the room there is: fresh memory costs as much as what is copied there."""
        room = self._room
        if room is None or room.dtype != dtype or room.shape[1:] != shape or len(room) < count:
            self._room = room = torch.empty(count, *shape, dtype=dtype, device=self.device)
        return room[:count]

    def _send(self, weight: Tensor, place: Tensor) -> None:
        """Copy through one of the pinned buffers, in the weight's own dtype: half types cross the bus as such."""
        size = weight.numel() * weight.element_size()
        slot = self._buffers[self._turn]
        if slot is not None:
            slot[1].synchronize()
        if slot is None or slot[0].numel() < size:
            slot = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
        buffer, sent = slot
        host = buffer[:size].view(weight.dtype).view(weight.shape)
        host.copy_(weight)
        place.copy_(host.to(self.device, non_blocking=True))
        sent.record()
        self._buffers[self._turn] = buffer, sent
        self._turn = 1 - self._turn
