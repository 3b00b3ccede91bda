"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` to write to; synced and renamed to it in the end, removed on failure.

    Raises:
        FileExistsError: there is something at `target`.
    """
    target = target.absolute()
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: expected a new folder, got one that exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for place in (*temporary.iterdir(), temporary):
            _sync(place)
        # If a folder was made there meanwhile, this fails unless that is empty.
        os.rename(temporary, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
