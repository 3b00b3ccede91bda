"""AdapterPool: the adapters of a source at work in one model, as many at a time as there are slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from loraxs_ext.layers import BASE, Known, LoraXSLayer, Route, Rows, fuse
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.store import Lease, Pager, RowLayout, RowSource, Segment, Slab

from .footing import footing_of
from .models import transformers_model
from .nesting import Nesting
from .placing import POOL, Placement, other_layers
from .rows import one_adapter_a_row

_ATTRIBUTE = "_loraxs_pool"


class AdapterPool:
    """LoRA-XS layers in a model that read one slab, and what brings adapters into its slots.

    The weights of the model are shared, not copied, and nothing becomes trainable. Outside of `adapters` and
    `token_slots` the model computes what it computed before, and its `state_dict` and `save_pretrained` leave the pool
    out. Move it to its device before, for the slab stays where it was made, and load weights after `close`, for modules
    under a layer have other names.

    One batch at a time: a thread that enters `adapters` or `token_slots` while another is inside waits for it. The
    choice of adapters belongs to the model, not to the thread: calls of the model by other threads meanwhile are
    served with it. `acquire`, `prefetch`, `pin` and `stats` may be called by any thread at any time.

    Args:
        model: a transformers model, a PeftModel around one, or either compiled. Modules that have LoRA-XS layers keep
            them, all others that the adapters change get one.
        source: where adapters come from by name, usually an `AdapterStore`, which also tells their basis.
        slots: how many adapters may be at work at the same time.
        rank: the largest rank that an adapter may have, cut to min(N, K) in small modules; None for what the source
            says.
        dtype: of the slab: None for fp32; or the dtype of a model in half precision, for half the memory and an R that
            is rounded to it.
        adapter_config: for a source without a manifest, the configuration its adapters were trained with. In any case
            its `basis_check`, `basis_tol` and `basis_file` count.

    Attributes:
        layers: that read the slab, in the order of the model.
        slab: `loraxs_ext.store.Slab`.

    Raises:
        ValueError: the model is not the one that the adapters were trained on, by numbers; or it has a pool already.
        TypeError: a module cannot be adapted.
    """

    def __init__(
        self,
        model: nn.Module,
        source: RowSource,
        *,
        slots: int = 256,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        adapter_config: LoraXSConfig | None = None,
    ) -> None:
        if rank is not None and rank < 1:
            raise ValueError(f"rank: expected a positive integer, got {rank}")
        self.model = transformers_model(model)
        if pool_of(self.model) is not None:
            raise ValueError("model: expected a model without a pool, got one that has a pool; close() that first")
        self.source = source
        self._turn = threading.RLock()
        self._nesting = Nesting()
        self._placement = Placement(self.model, footing_of(source, self.model, adapter_config), rank)
        try:
            self.layers = tuple(self._placement.layers)
            self.device = _common_device(self.layers)
            layout = RowLayout(Segment(layer.key, layer.r[POOL]) for layer in self.layers)
            self.slab = Slab(layout, slots, _check_dtype(dtype, self.layers), self.device)
            self._pages = [_at_home(self.slab.pages(layer.key)) for layer in self.layers]
            self._pager = Pager(source, self.slab)
        except BaseException:
            self._placement.undo()
            raise
        self._prepared: Known = {}
        # What other adapters of the model do is no part of any row.
        self._others = other_layers(self.model, self.layers)
        for layer in (*self.layers, *self._others):
            layer.route = None
        setattr(self.model, _ATTRIBUTE, self)

    @contextmanager
    def adapters(self, names: Sequence[str | None], timeout: float | None = None) -> Iterator[None]:
        """See `loraxs_ext.adapters`."""
        check_names(names)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._one_at_a_time(timeout):
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            with self.acquire(names, remaining) as lease:
                slots = torch.tensor(lease.slots, dtype=torch.int32, device=self.device)
                with self._serving(slots), one_adapter_a_row(self.model, self.layers):
                    yield

    @contextmanager
    def token_slots(
        self, slots: Tensor | None = None, timeout: float | None = None
    ) -> Iterator[Callable[[Tensor], None]]:
        """Serve token m of every forward pass inside the context from slot slots[m]; for servers.

        Nothing is looked up and nothing is waited for: the caller holds leases (`acquire`) of the slots it names.
        Kernels are launched the same way whatever the slots are, so a captured CUDA graph may be replayed after the
        tensor was overwritten in place; `slot_buffer` makes one for that.

        Args:
            slots: int32 [tokens] on the device of the pool, from −1, the base model, to S − 1; None for −1 everywhere
                until the first assignment. On a GPU, what is in it isn't read here, for that would wait for the device,
                nor is what is written into it later: the caller vouches for it, and kernels read whatever a wrong slot
                points at.
            timeout: seconds to wait for another thread that is inside; None for ever.

        Yields:
            a function that puts another tensor in the place of `slots`.

        Raises:
            ValueError: not such a tensor; on the CPU, a slot that there is not; or, by the forward pass, not as many
                slots as tokens.
            TimeoutError: another thread is inside.
        """
        with self._one_at_a_time(timeout):
            with self._serving(self.slot_buffer(1) if slots is None else self._check_slots(slots)) as assign:
                yield lambda new: assign(self._check_slots(new))

    def slot_buffer(self, tokens: int) -> Tensor:
        """int32 [tokens] of −1 on the device of the pool, to be overwritten in place between replays of a graph."""
        return _at_home(torch.full((tokens,), -1, dtype=torch.int32, device=self.device))

    def acquire(self, names: Sequence[str | None], timeout: float | None = None) -> Lease:
        """Bring adapters into slots and keep them there until the lease is released.

        Args:
            names: of adapters; None for the base model.
            timeout: seconds to wait for slots that others hold; None for ever.

        Returns:
            a context manager; `lease.slots` has one slot per name, −1 for None.

        Raises:
            KeyError: there is no such adapter.
            TimeoutError: no slot came free.
            ValueError: more adapters than there are slots.
            RuntimeError: an adapter does not fit the pool.
        """
        return self._pager.acquire(names, timeout)

    def prefetch(self, names: Sequence[str]) -> int:
        """Begin to bring adapters into slots that nobody uses, without waiting; returns how many. See `Pager`."""
        return self._pager.prefetch(names)

    def pin(self, names: Sequence[str], timeout: float | None = None) -> None:
        """Bring adapters into slots and keep them there until `unpin`; waits as `acquire` does."""
        self._pager.pin(names, timeout)

    def unpin(self, names: Sequence[str]) -> None:
        """Let adapters be evicted again."""
        self._pager.unpin(names)

    def stats(self) -> dict[str, int | float]:
        """Slots, hits, misses, evictions, waits and loads since the beginning; see `Pager.stats`."""
        return self._pager.stats()

    def detach(self) -> None:
        """Take the pool out of the model, which is then what it was before.

        Raises:
            RuntimeError: a thread serves with it.
        """
        if not self._turn.acquire(blocking=False):
            raise RuntimeError("pool: expected no thread inside adapters() or token_slots(), got one")
        try:
            if any(layer.route is not None for layer in self.layers):
                raise RuntimeError("pool: expected to be outside of adapters() and token_slots(), got a call inside")
            self._placement.undo()
            self.layers, self._pages, self._others = (), [], []
            self._prepared.clear()
            # After a first call, the model may have another pool.
            if pool_of(self.model) is self:
                delattr(self.model, _ATTRIBUTE)
        finally:
            self._turn.release()

    def close(self) -> None:
        """`detach`, and stop what works for the pool."""
        self.detach()
        self._pager.close()

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled model has no pool.
        return type(None), ()

    @contextmanager
    def _one_at_a_time(self, timeout: float | None) -> Iterator[None]:
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout: expected seconds, 0 or more, got {timeout}")
        if not self._turn.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)):
            raise TimeoutError(f"pool: another thread was inside adapters() or token_slots() for {timeout:g} s")
        try:
            # Known only now: it may have been detached while this thread waited.
            if not self.layers:
                raise RuntimeError("pool: expected one that is in its model, got one that was detached")
            self._nesting.check_task()
            yield
        finally:
            self._turn.release()

    @contextmanager
    def _serving(self, slots: Tensor) -> Iterator[Callable[[Tensor], None]]:
        """Route every layer by `slots`; yields what replaces them."""
        layers = (*self.layers, *self._others)
        if self.model.training:
            raise ValueError("model: expected eval mode, got training mode; call model.eval()")
        if any(layer.merged_adapters or layer.disable_adapters for layer in layers):
            raise ValueError(
                "model: expected adapters that are neither merged nor disabled, got some; unmerge them first"
            )
        rows = Rows(slots, exact=True)
        routes = {layer: Route(rows, pages, POOL) for layer, pages in zip(self.layers, self._pages, strict=True)}
        fuse(routes, self._prepared)

        def assign(new: Tensor) -> None:
            rows.slots = new

        base_rows = {layer: Route(rows, None, BASE) for layer in self._others}
        with self._nesting.following(dict(chain(routes.items(), base_rows.items()))):
            yield assign

    def _check_slots(self, slots: Tensor) -> Tensor:
        if slots.dtype != torch.int32 or slots.ndim != 1 or slots.device != self.device:
            got = f"{slots.dtype} {list(slots.shape)} on {slots.device}"
            raise ValueError(f"slots: expected torch.int32 [tokens] on {self.device}, got {got}")
        if slots.device.type == "cpu" and slots.numel():
            least, most = (int(bound) for bound in slots.aminmax())
            if least < -1 or most >= self.slab.slots:
                wrong = least if least < -1 else most
                raise ValueError(f"slots: expected -1 (the base model) to {self.slab.slots - 1}, got {wrong}")
        return slots


def pool_of(model: nn.Module) -> AdapterPool | None:
    """The pool of a transformers model."""
    return vars(model).get(_ATTRIBUTE)


def check_names(names: Sequence[str | None]) -> None:
    """Raise unless they are a list of names."""
    if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"names: expected a list with a name or None for each row, got {names!r:.100}")
    if not names:
        raise ValueError("names: expected a name or None for each row of the batch, got none")


def _common_device(layers: Sequence[LoraXSLayer]) -> torch.device:
    devices = sorted({str(layer.get_base_layer_device()) for layer in layers})
    if len(devices) != 1 or devices == ["meta"]:
        raise ValueError(f"model: expected all adapted modules on one device, got {devices}")
    return torch.device(devices[0])


def _check_dtype(dtype: torch.dtype | None, layers: Sequence[LoraXSLayer]) -> torch.dtype:
    """One that every op takes: fp32, or that of its activations."""
    if dtype is None or dtype == torch.float32:
        return torch.float32
    kinds = {layer.basis_dtype for layer in layers}
    if kinds != {dtype}:
        raise ValueError(
            f"dtype: expected torch.float32 or the dtype of the model, {sorted(map(str, kinds))}, got {dtype}"
        )
    return dtype


def _at_home(tensor: Tensor) -> Tensor:
    """Tell the compiler that this tensor stays where it is, so that a CUDA graph reads it in place."""
    if tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor)
    return tensor
