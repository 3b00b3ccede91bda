"""transformers' continuous batching, in which every token is served from the slot of its request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)

from ..pool import AdapterPool
from .sampling import processors


class SlotBatching(ContinuousBatchingManager):
    """Continuous batching over a pool.

    Its loop runs in a thread, and is inside `pool.token_slots` as long as it runs.

    Blocks of the cache are never shared: transformers finds them by their tokens alone, and keys and values of the
    same tokens differ between adapters and between versions of one. Batches are computed one after the other and
    without CUDA graphs, so that the slots of a batch are those that were noted for it.

    Args:
        pool: in the model that is served.
        page, blocks: tokens of a block of the cache, and blocks; None for what the device has room for.
        batch_tokens: tokens of a batch; None for what fits.
        removed: called by the loop with the requests that it cancelled, when it no longer computes them.
    """

    def __init__(
        self,
        pool: AdapterPool,
        *,
        page: int,
        blocks: int | None,
        batch_tokens: int | None,
        removed: Callable[[list[str]], None],
    ) -> None:
        # Up to 5.17, transformers called a page a block.
        size = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
        sizes: dict[str, Any] = {size: page}
        config = ContinuousBatchingConfig(
            **sizes,
            num_blocks=blocks,
            max_batch_tokens=batch_tokens,
            max_memory_percent=0.8,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        model: Any = pool.model
        super().__init__(model, GenerationConfig(do_sample=False, eos_token_id=-1), config)
        self.logit_processor = processors()
        self._pool, self._page, self._removed = pool, page, removed
        self._assign: Callable[[Tensor], None] | None = None
        # By request. Set before the request is added, and taken out when it is certain that nothing computes it.
        self.slots: dict[str, int] = {}

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds, once the loop has started."""
        processor = self.batch_processor
        return 0 if processor is None else processor.cache.num_blocks * self._page

    def forget(self, request: str) -> None:
        """Drop what is kept of a request that was cancelled and will give no result any more."""
        self.slots.pop(request, None)
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request, None)

    def _run_generation_loop(self) -> None:
        with self._pool.token_slots() as self._assign:
            super()._run_generation_loop()

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        inputs: Any = processor.inputs_and_outputs
        scheduler: Any = processor.scheduler
        prepare, clear = inputs.prepare_batch_tensors, scheduler.clear_cancelled_requests

        def prepare_with_slots(**batch: Any) -> None:
            self._assign_slots(batch["requests_in_batch"], batch["num_q_tokens"])
            prepare(**batch)

        def clear_and_tell() -> list[Any]:
            states = clear()
            if states:
                self._removed([state.request_id for state in states])
            return states

        inputs.prepare_batch_tensors = prepare_with_slots
        scheduler.clear_cancelled_requests = clear_and_tell
        return processor

    def _assign_slots(self, requests: list[Any], tokens: int) -> None:
        assert self._assign is not None
        slots = [slot for r in requests for slot in [self.slots[r.state.request_id]] * r.query_length]
        # Padding computes something that nobody reads, with the base model.
        slots += [-1] * (tokens - len(slots))
        self._assign(torch.tensor(slots, dtype=torch.int32, device=self._pool.device))
