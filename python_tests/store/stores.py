"""Small stores and rows for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraxs_ext.store import AdapterRow, AdapterStore, Manifest, RowLayout, Segment, in_dtype

KEYS = ("model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj")
RANK = 4


def manifest(fingerprint: str = "0123456789abcdef", rank: int = RANK) -> Manifest:
    generator = torch.Generator().manual_seed(7)
    sketches = {key: torch.randn(5, rank, generator=generator) for key in KEYS}
    return Manifest(fingerprint, {"sigma": "A", "tol": 1e-3}, {"peft_type": "LORAXS", "r": rank}, sketches)


def layout(rank: int = RANK, scaling: float = 0.1 + 0.2) -> RowLayout:
    return RowLayout(Segment(key, rank, scaling) for key in KEYS)


def row(name: str, seed: int = 0, rank: int = RANK, dtype: torch.dtype = torch.float32) -> AdapterRow:
    """Normally distributed numbers that depend on the seed."""
    ours = layout(rank)
    numbers = torch.randn(ours.size, generator=torch.Generator().manual_seed(seed))
    return in_dtype(AdapterRow(name, 0, ours, numbers), dtype)


def create(path: Path, **options: Any) -> AdapterStore:
    pytest.importorskip("lmdb")
    return AdapterStore.create(path, manifest(), **options)


def same(first: AdapterRow, second: AdapterRow) -> bool:
    """Whether two rows hold the same bits, names and versions aside."""
    if first.layout != second.layout or first.numbers.dtype != second.numbers.dtype:
        return False
    if (first.steps is None) != (second.steps is None):
        return False
    if first.steps is not None and second.steps is not None and not torch.equal(first.steps, second.steps):
        return False
    return torch.equal(first.numbers.view(torch.uint8), second.numbers.view(torch.uint8))
