"""A base model and an adapter of it in folders, as users have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..peft.models import CASES, Case, layers_of, logits


class Folders(NamedTuple):
    """Where the base model and the adapter lie, and how to load them."""

    case: Case
    base: Path
    adapter: Path

    def load(self, path: Path | None = None) -> nn.Module:
        """The base model, or another one of its class."""
        return type(self.case.base()).from_pretrained(path or self.base).eval()

    def adapted(self, adapter: Path | None = None) -> PeftModel:
        """The base model with the adapter in `adapter`."""
        return PeftModel.from_pretrained(self.load(), adapter or self.adapter).eval()

    def logits(self, model: nn.Module) -> Tensor:
        """Of some input."""
        return logits(model, self.case.inputs())


def save(case: Case, path: Path, *, dtype: torch.dtype = torch.float32, shard: str = "10KB", **config) -> Folders:
    """Save a base and an adapter that clearly changes it, heads included."""
    case.base(dtype=dtype).save_pretrained(path / "base", max_shard_size=shard)
    folders = Folders(case, path / "base", path / "adapter")
    model = get_peft_model(folders.load(), case.config(**config))
    assert layers_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name or (parameter.requires_grad and name.endswith(".bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folders.adapter)
    return folders


@contextmanager
def saved(path: Path) -> Iterator[Folders]:
    """A decoder and an adapter of it, for several tests; inside, bases come from a cache beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAXS_CACHE", str(path / "cache"))
        torch.manual_seed(0)
        yield save(CASES["llama"], path, shard="1MB")
