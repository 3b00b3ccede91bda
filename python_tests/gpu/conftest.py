"""GPU tests skip without a device, and stop the process when one of them has broken it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def stop_when_the_device_is_lost(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an illegal access every later CUDA call of the process fails: end it, rather than blame the other tests."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{request.node.nodeid} broke the device: {error}", returncode=3)
