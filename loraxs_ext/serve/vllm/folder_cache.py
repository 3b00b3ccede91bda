"""Folders that are made when first asked for and forgotten when they take too much room, shared by processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraxs_ext.files import lock_folder

# Seconds between two looks whether another process has made a folder; it takes that a moment.
_POLL = 0.02
# Seconds after which a half made folder that nobody holds is one of a killed process.
_ABANDONED = 3600.0


class FolderCache:
    """Folders by digest under one root, least recently used ones removed beyond a size, never one that is in use.

    Processes and threads may share the root. A folder in use is one that somebody `hold`s: a shared lock, which the
    operating system lets go of with the process. A folder is there whole or not at all.

    Args:
        root: folder of the cache; made when first written to. Nothing else may be kept in it.
        limit: bytes that the folders may take together. What is in use is kept even beyond it.

    Raises:
        ValueError: `limit` is negative.
    """

    def __init__(self, root: Path, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit: expected a number of bytes, got {limit}")
        self.root, self.limit = root.absolute(), limit
        # Beyond the limit for the sake of those in use; to be looked at when one of them is let go of.
        self._crowded = False

    @contextmanager
    def hold(self, digest: str, make: Callable[[Path], None]) -> Iterator[Path]:
        """The folder of `digest`, which stays at least until the context is left.

        Args:
            digest: hexadecimal digits that say all about the content.
            make: called with the path where the folder is not there; makes it whole or not at all. Raises
                FileExistsError or BlockingIOError where another was first.
        """
        if not digest or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"digest: expected hexadecimal digits, got {digest!r}")
        path = self.root / digest
        made = False
        while (descriptor := _lock(path, fcntl.LOCK_SH)) is None:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                make(path)
                made = True
            except FileExistsError:
                continue
            except BlockingIOError:
                time.sleep(_POLL)
        try:
            os.utime(path)
            if made:
                self._evict()
            yield path
        finally:
            os.close(descriptor)
            if self._crowded:
                self._evict()

    def _evict(self) -> None:
        """Remove what is beyond the limit, and what killed processes left half made."""
        entries = []
        for path in self.root.iterdir():
            try:
                status = path.stat()
                size = sum(file.stat().st_size for file in path.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                # Another process was first, or it is no folder of ours.
                continue
            if not path.name.startswith("."):
                entries.append((status.st_mtime_ns, size, path))
            elif time.time() - status.st_mtime > _ABANDONED:
                _remove(path)
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            if _remove(path):
                total -= size
        self._crowded = total > self.limit


def _lock(path: Path, kind: int) -> int | None:
    """A descriptor that holds a lock of the folder; None if there is no such folder, or it is in use otherwise."""
    try:
        return lock_folder(path, kind)
    except (FileNotFoundError, NotADirectoryError, BlockingIOError):
        return None


def _remove(path: Path) -> bool:
    """Remove a folder that nobody holds; whether it is gone."""
    descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if descriptor is None:
        return not path.exists()
    try:
        # Under another name first: whoever sees the old one sees the whole folder.
        gone = path.with_name(f".{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)
