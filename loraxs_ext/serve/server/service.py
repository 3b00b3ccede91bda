"""What the routes of a server share: the engine, the store, limits, keys and counters."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from loraxs_ext.store import AdapterStore

from .auth import Keys
from .engine import Engine
from .errors import ApiError, unknown_model
from .limits import Limits
from .metrics import Metrics
from .text import Tokens


@dataclass
class Service:
    """A served model.

    Attributes:
        name: of the base model towards clients; an adapter of it is `name:adapter`.
        engine: that computes, over a pool of the adapters in `store`.
        tokens: the tokenizer.
        store: of the adapters; written to only by routes of the administrator.
        api_keys: that clients need; none for no check.
        admin_keys: that the administrator needs; none for no such routes.
        draining: whether the server ends, and takes nothing new.
        started: when, in seconds since 1970.
    """

    name: str
    engine: Engine
    tokens: Tokens
    store: AdapterStore
    limits: Limits
    api_keys: Keys = field(default_factory=Keys)
    admin_keys: Keys = field(default_factory=Keys)
    draining: bool = False
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.levels)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine.alive and not self.draining

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a client means by a model; None for the base model.

        Raises:
            ApiError: 404, there is none.
        """
        if model == self.name:
            return None
        # The name of the base model may have colons, and so may that of an adapter.
        if not model.startswith(f"{self.name}:"):
            raise unknown_model(model)
        adapter = model[len(self.name) + 1 :]
        try:
            self.store.version(adapter)
        except (KeyError, ValueError):
            raise unknown_model(model) from None
        return adapter

    def levels(self) -> dict[str, float]:
        """Numbers of this moment, for Prometheus."""
        stats = self.engine.pool.stats()
        sizes = self.store.stat()
        return {
            "running": self.engine.running,
            "waiting": self.engine.waiting,
            "queue_limit": self.limits.queue,
            "slots": stats["slots"],
            "slots_resident": stats["resident"],
            "slots_in_use": stats["in_use"],
            "slot_hits_total": stats["hits"],
            "slot_misses_total": stats["misses"],
            "slot_evictions_total": stats["evictions"],
            "slot_waits_total": stats["waits"],
            "slot_wait_seconds_total": stats["wait_seconds"],
            "adapter_loads_total": stats["loads"],
            "adapter_load_seconds_total": stats["load_seconds"],
            "store_adapters": sizes.adapters,
            "store_bytes": sizes.nbytes,
        }

    def state(self) -> dict[str, Any]:
        """What a page shows."""
        stats = self.engine.pool.stats()
        sizes = self.store.stat()
        asked = stats["hits"] + stats["misses"]
        return {
            "model": self.name,
            "chat": bool(self.tokens.tokenizer.chat_template),
            "ready": self.ready,
            "uptime_seconds": time.time() - self.started,
            "context": self.engine.context,
            "store": {"adapters": sizes.adapters, "bytes": sizes.nbytes},
            "slots": {name: stats[name] for name in ("slots", "free", "resident", "in_use", "pinned")},
            "hits": stats["hits"],
            "misses": stats["misses"],
            "hit_rate": stats["hits"] / asked if asked else None,
            "evictions": stats["evictions"],
            "running": self.engine.running,
            "waiting": self.engine.waiting,
            "queue_limit": self.limits.queue,
            **self.metrics.recent(),
        }


def busy() -> ApiError:
    """The server ends, or its engine has."""
    return ApiError(503, "the server takes no requests at the moment", code="unavailable", headers={"Retry-After": "5"})
