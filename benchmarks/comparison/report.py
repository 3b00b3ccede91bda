"""The table and the figure of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(content: dict[str, Any]) -> str:
    raise NotImplementedError


def draw(content: dict[str, Any], path: Path) -> None:
    raise NotImplementedError
