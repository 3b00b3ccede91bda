"""Every test gets a cache of bases of its own, and a fresh compiler."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path_factory.mktemp("bases")))
    torch.manual_seed(0)
    torch._dynamo.reset()
