"""Global switches of torch that a test may turn, and has to turn back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def restored_precision() -> Iterator[None]:
    """Whatever the body allows fp32 products to be computed in, afterwards they are fp32 again.

    The older of torch's two interfaces keeps a value of its own, which only it sets back.
    """
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
