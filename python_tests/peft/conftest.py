"""Every test gets a cache of bases of its own, and a fresh compiler."""

from __future__ import annotations

import pytest
import torch

from .models import CASES, Case


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Case:
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def llama() -> Case:
    """A decoder, for what does not depend on the architecture."""
    return CASES["llama"]


@pytest.fixture
def bert() -> Case:
    """A classifier with a trainable head."""
    return CASES["bert"]


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path_factory.mktemp("bases")))
    torch.manual_seed(0)
