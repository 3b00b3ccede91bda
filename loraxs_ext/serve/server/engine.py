"""The model, its pool and continuous batching: prompts of any adapters go in, tokens come out as they are computed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from loraxs_ext.store import Lease

from ..pool import AdapterPool
from .batching import SlotBatching
from .limits import Limits
from .sampling import Sampling

# Threads that bring adapters into slots. Those that wait for a slot stand in line, as they do in the pool.
_LEASING = 8
# Tokens of a block of the cache.
_PAGE = 64
# Seconds that the loop gets to end the batch it computes.
_STOP_SECONDS = 30.0


class QueueFullError(RuntimeError):
    """As many answers as the limits allow are waiting or running."""


class UnavailableError(RuntimeError):
    """The engine does not work, or not any more."""


class Generation:
    """An answer in the making: an asynchronous iterator of lists of new tokens.

    Attributes:
        ended: whether nothing more is computed for it.
    """

    def __init__(self, engine: Engine, name: str, lease: Lease | None) -> None:
        self.name, self.ended = name, False
        self._engine, self._lease = engine, lease
        self._results: asyncio.Queue[Any] = asyncio.Queue()
        self._seen = 0
        self._cancelled = False

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        """Raises UnavailableError if the computation failed."""
        while True:
            result = await self._results.get()
            if result is None:
                return
            if result.error is not None:
                raise UnavailableError("the answer was not finished: the engine stopped")
            if new := result.generated_tokens[self._seen :]:
                self._seen += len(new)
                yield new
            if result.is_finished():
                return

    def cancel(self) -> None:
        """Compute no more of it. The iterator ends, and the adapter is let go of as soon as no batch reads it."""
        if not self.ended and not self._cancelled:
            self._cancelled = True
            self._results.put_nowait(None)
            self._engine._batching.cancel_request(self.name)

    def _receive(self, result: Any) -> None:
        self._results.put_nowait(result)
        if result.is_finished():
            self._end()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            if self._lease is not None:
                self._lease.release()
            self._engine._ended(self)


class Engine:
    """Serves the adapters of a pool to any number of requests at a time; used from one event loop.

    Args:
        pool: in the model that is served.
        limits: on tokens, queue and waiting.
        cache_tokens: that keys and values are kept of; None for what the device has room for.
        batch_tokens: of a step; None for what fits.

    Attributes:
        context: tokens that a prompt and its answer may have together; known after `start`.
    """

    def __init__(
        self,
        pool: AdapterPool,
        limits: Limits,
        *,
        cache_tokens: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.pool, self.limits = pool, limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._batching = SlotBatching(
            pool,
            page=_PAGE,
            blocks=None if cache_tokens is None else -(-cache_tokens // _PAGE),
            batch_tokens=batch_tokens,
            removed=self._removed,
        )
        self._leasing = ThreadPoolExecutor(_LEASING, thread_name_prefix="loraxs-lease")
        self._generations: dict[str, Generation] = {}
        self._waiting = 0
        self.context = 0

    async def start(self) -> None:
        """Start the loop, and wait until it is ready.

        Raises:
            UnavailableError: it did not start.
        """
        self._loop = asyncio.get_running_loop()
        self._batching.start()
        while self._batching.is_running() and not self._batching.capacity:
            await asyncio.sleep(0.01)
        if not self.alive:
            reason = self._batching.background_thread_status.fatal_error
            raise UnavailableError(f"continuous batching did not start: {reason}") from reason
        # One block is kept free for the token that is being computed.
        room = [self._batching.capacity - _PAGE, self.limits.context]
        room.append(getattr(self.pool.model.config, "max_position_embeddings", None))
        self.context = min(size for size in room if size is not None)

    async def stop(self) -> None:
        """End what runs, with an error, and stop the loop."""
        for generation in list(self._generations.values()):
            generation.cancel()
        if self._batching.is_running():
            await asyncio.to_thread(self._batching.stop, timeout=_STOP_SECONDS, hard_stop=True)
        for generation in list(self._generations.values()):
            generation._end()
        self._leasing.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the loop runs and takes requests."""
        return self._batching.is_running() and not self._batching.background_thread_status.can_accept_new_requests()

    @property
    def running(self) -> int:
        """Answers that hold what they need and are being computed, or are about to."""
        return len(self._generations)

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot for their adapter."""
        return self._waiting

    async def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        sampling: Sampling,
        max_tokens: int,
        end: Sequence[int] = (),
        *,
        streaming: bool = True,
    ) -> Generation:
        """Take a request, and wait until its adapter is in a slot, as it is then.

        Args:
            prompt: tokens, at least one.
            adapter: name; None for the base model.
            sampling: how tokens are chosen.
            max_tokens: most new tokens.
            end: tokens that end the answer; the one that does is its last.
            streaming: give tokens as they come; False for all at the end.

        Raises:
            KeyError: there is no such adapter.
            QueueFullError: too many requests; try later.
            TimeoutError: no slot came free.
            UnavailableError: the engine does not work.
            RuntimeError: the adapter could not be loaded.
        """
        if not prompt or max_tokens < 1 or len(prompt) + max_tokens > self.context:
            raise ValueError(f"prompt: expected 1 to {self.context} tokens with the answer, got {len(prompt)}")
        if not self.alive:
            raise UnavailableError("the engine is not running")
        if self.running + self._waiting >= self.limits.queue:
            raise QueueFullError(f"{self.limits.queue} answers are waiting or running")
        lease = None if adapter is None else await self._lease(adapter)
        generation = Generation(self, uuid.uuid4().hex, lease)
        self._generations[generation.name] = generation
        try:
            self._batching.slots[generation.name] = -1 if lease is None else lease.slots[0]
            self._batching.register_result_handler(generation.name, generation._receive)
            accepted = self._batching.add_request(
                list(prompt),
                request_id=generation.name,
                max_new_tokens=max_tokens,
                streaming=streaming,
                eos_token_id=list(end),
                sampling=sampling,
            )
            if accepted is None:
                raise UnavailableError("the engine is not running")
        except BaseException:
            generation._end()
            raise
        return generation

    async def _lease(self, adapter: str) -> Lease:
        self._waiting += 1
        future = self._leasing.submit(self._acquire, adapter, time.monotonic() + self.limits.slot_seconds)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_give_back)
            raise
        finally:
            self._waiting -= 1

    def _acquire(self, adapter: str, deadline: float) -> Lease:
        lease = self.pool.acquire([adapter], max(0.0, deadline - time.monotonic()))
        if self.pool.device.type == "cuda":
            # This stream waits for the copy, but the loop computes on another one.
            torch.cuda.current_stream(self.pool.device).synchronize()
        return lease

    def _removed(self, names: list[str]) -> None:
        """The loop has cancelled these; called in its thread."""

        def end() -> None:
            for name in names:
                if name in self._generations:
                    self._generations[name]._end()

        assert self._loop is not None
        self._loop.call_soon_threadsafe(end)

    def _ended(self, generation: Generation) -> None:
        self._generations.pop(generation.name, None)
        self._batching.forget(generation.name)


def _give_back(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
