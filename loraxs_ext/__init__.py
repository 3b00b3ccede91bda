"""LoRA-XS for PEFT models: fused layers, R-only adapters, and batches in which every row uses another adapter.

Importing this package registers `LoraXSConfig` with PEFT. It touches neither CUDA nor Triton nor a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops as ops
from .basis import Recipe, randomized_svd
from .checkpoint import from_lora, load_reference, load_tinylora, merge, save_tinylora, to_lora
from .peft import LoraXSConfig, LoraXSModel, find_and_initialize

if TYPE_CHECKING:
    from .serve import AdapterPool, adapters
    from .store import AdapterStore

__version__ = "0.1.0"

__all__ = [
    "AdapterPool",
    "AdapterStore",
    "LoraXSConfig",
    "LoraXSModel",
    "Recipe",
    "adapters",
    "find_and_initialize",
    "from_lora",
    "load_reference",
    "load_tinylora",
    "merge",
    "ops",
    "randomized_svd",
    "save_tinylora",
    "to_lora",
]


def __getattr__(name: str) -> Any:
    # Serving is a part of its own, which training does without.
    if name in ("AdapterPool", "adapters"):
        from . import serve

        return getattr(serve, name)
    if name == "AdapterStore":
        from .store import AdapterStore

        return AdapterStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
