"""JSON objects: read with their size and kind checked, written as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic import atomic_file

# A configuration with patterns for every module of a large model takes some 100 kB.
_LIMIT = 1 << 24


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object that a text is.

    Args:
        text: UTF-8 if bytes.
        what: is read; messages begin with it.

    Raises:
        ValueError: the text is anything else.
    """
    try:
        values = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"{what}: expected a JSON object: {reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{what}: expected a JSON object, got {type(values).__name__}")
    return values


def read_json(path: Path, limit: int = _LIMIT) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        limit: bytes that it may have.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds anything else, or more.
    """
    with path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"{path}: expected a JSON object of at most {limit} bytes, got more")
    return parse_object(text, str(path))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write the file as a whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
