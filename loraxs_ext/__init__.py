"""LoRA-XS for PEFT models: fused layers, R-only adapters, and batches in which every row uses another adapter.

Importing this package registers `LoraXSConfig` with PEFT. It touches neither CUDA nor Triton nor a compiler.
"""

from __future__ import annotations

from . import ops as ops
from .basis import Recipe, randomized_svd
from .checkpoint import from_lora, load_reference, load_tinylora, merge, save_tinylora, to_lora
from .peft import LoraXSConfig, LoraXSModel, find_and_initialize

__version__ = "0.1.0"

__all__ = [
    "LoraXSConfig",
    "LoraXSModel",
    "Recipe",
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
