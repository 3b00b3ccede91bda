"""Fixtures of the Triton tests; without Triton, which is optional, they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ...precision import restored_precision
from .harness import Interpreter


@pytest.fixture(scope="session", autouse=True)
def triton_is_installed() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """Calls launchers under Triton's interpreter: `interpreted("linear.linear", *args)`."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allows TF32 in matmuls in fp32."""
    with restored_precision():
        torch.set_float32_matmul_precision("high")
        yield
