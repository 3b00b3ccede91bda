"""Which model is meant: the transformers model inside what users hold."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn


def transformers_model(model: nn.Module) -> nn.Module:
    """The model itself, out of a PeftModel, or a compiled model, or both."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        else:
            return inner
