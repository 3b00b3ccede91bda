"""Every test gets a cache of bases of its own; models are saved once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .tiny import reviews, save_bert, save_llama, sums, write_jsonl


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path_factory.mktemp("bases")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    """Folder of an encoder."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """Folder of a decoder."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def review_run(bert: str, tmp_path: Path) -> dict[str, Any]:
    """The values of a small classification run."""
    return {
        "output": str(tmp_path / "run"),
        "model": {"name": bert},
        "adapter": {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value", "dense"]},
        "data": {
            "train": write_jsonl(tmp_path / "train.jsonl", reviews(48)),
            "test": write_jsonl(tmp_path / "test.jsonl", reviews(20, seed=1)),
            "dev_size": 12,
        },
        "training": {"lr": 5e-3, "head_lr": 2e-2, "epochs": 2, "batch": 8, "log_steps": 2, "cpu": True},
    }


@pytest.fixture
def sum_run(llama: str, tmp_path: Path) -> dict[str, Any]:
    """The values of a small instruction run."""
    return {
        "task": "instruction",
        "output": str(tmp_path / "run"),
        "model": {"name": llama},
        "adapter": {"r": 8, "lora_alpha": 8},
        "data": {
            "train": write_jsonl(tmp_path / "train.jsonl", sums(48)),
            "test": write_jsonl(tmp_path / "test.jsonl", sums(7, seed=1)),
            "answer": "answer",
            "template": "plain",
            "max_length": 24,
            "dev_size": 8,
        },
        "training": {"lr": 3e-2, "epochs": 2, "batch": 8, "log_steps": 2, "cpu": True},
        "generation": {"max_new_tokens": 6, "batch": 3},
    }
