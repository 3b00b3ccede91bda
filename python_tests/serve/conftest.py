"""Every test gets a cache of bases of its own."""

from __future__ import annotations

import pytest
import torch

from ..peft.models import CASES
from .scenes import Scene


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path_factory.mktemp("bases")))
    torch.manual_seed(0)


@pytest.fixture(params=["llama", "gpt2", "t5"])
def scene(request):
    """Each architecture in turn: nn.Linear, Conv1D, encoder and decoder."""
    with Scene(CASES[request.param]) as scene:
        yield scene


@pytest.fixture
def llama():
    """A decoder, for what does not depend on the architecture."""
    with Scene(CASES["llama"]) as scene:
        yield scene
