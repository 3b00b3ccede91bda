"""Serving: a pool of adapters in one model, and batches in which every row uses another of them."""

from __future__ import annotations

from .context import adapters as adapters
from .pool import AdapterPool as AdapterPool
