"""Every test gets a cache of bases of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .folders import Folders, saved


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path_factory.mktemp("bases")))
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    """A base and an adapter of it, for all tests of a module."""
    with saved(tmp_path_factory.mktemp("made")) as folders:
        yield folders
