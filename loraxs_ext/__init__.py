"""LoRA-XS for PEFT models: fused layers, R-only adapters, and batches in which every row uses another adapter."""

from __future__ import annotations

from . import ops as ops

__version__ = "0.1.0"
