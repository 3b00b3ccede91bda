"""Files and folders that appear under their name whole or not at all, whatever happens to who writes them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# A folder that holds one of these is one that may be replaced.
_MARKS = ("config.json", "adapter_config.json")

# Of renameat2, from linux/fcntl.h and linux/fs.h.
_HERE, _EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; synced and renamed to `path` on success, removed on failure.

    Of several writers at once, the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` to write to; synced and put in the place of `path` on success, else removed.

    A process killed at any moment leaves the old folder or the new one under the name, and beside it at most
    `.NAME.partial`, which the next call for the same path starts anew. On file systems that cannot exchange two names
    in one step, one killed between the two leaves the old folder as `.NAME.replaced`; the next call puts it back.

    Args:
        path: folder to be made; those above it are made too.
        overwrite: whether it may replace a folder of a model or an adapter that holds no other adapter.

    Raises:
        FileExistsError: `path` exists and may not be replaced.
        BlockingIOError: another process or thread is writing it.
    """
    path = path.absolute()
    _check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (path.with_name(f".{path.name}.{state}") for state in ("partial", "replaced"))
    with _locked(temporary) as lock:
        try:
            _restore(replaced, path)
            # Again, now that nobody else writes: another may have finished since.
            _check_free(path, overwrite)
            _empty(temporary)
            yield temporary
            sync_folder(temporary)
            _check_free(path, overwrite)
            if path.exists():
                _replace(path, temporary, replaced)
            else:
                os.rename(temporary, path)
                _sync(path.parent)
        except BaseException:
            # Once it is renamed, the temporary name is free for others.
            if _is_at(lock, temporary):
                shutil.rmtree(temporary, ignore_errors=True)
                _restore(replaced, path)
            raise


def sync_folder(folder: Path) -> None:
    """Put everything in the folder on the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists and is not to be overwritten; name another folder")
    if path.is_symlink() or not any((path / mark).is_file() for mark in _MARKS):
        raise FileExistsError(f"{path} is not the folder of a model or an adapter, and is not overwritten")
    inner = next(path.glob(f"*/**/{_MARKS[1]}"), None)
    if inner is not None:
        raise FileExistsError(f"{path} also holds the adapter {inner.parent.relative_to(path)}, and is not overwritten")


def _replace(path: Path, temporary: Path, replaced: Path) -> None:
    """Put `temporary` in the place of `path`, and remove what was there."""
    # Under the temporary name, the old folder must not be taken for one to be written to.
    with _locked(path):
        if _exchange(temporary, path):
            replaced = temporary
        else:
            os.rename(path, replaced)
            os.rename(temporary, path)
        _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def _restore(replaced: Path, path: Path) -> None:
    """Undo or finish what one that was killed while it replaced `path` had begun."""
    if not replaced.is_dir():
        return
    if os.path.lexists(path):
        shutil.rmtree(replaced)
    else:
        os.rename(replaced, path)


def _empty(folder: Path) -> None:
    for stale in list(folder.iterdir()):
        shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Make `folder` where there is none, and hold its lock; the descriptor that does.

    Raises:
        BlockingIOError: somebody else holds it.
    """
    # Not everywhere: the package is imported on Windows too.
    import fcntl

    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        try:
            descriptor = lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except FileNotFoundError:
            # Another, who had it first, has finished and renamed it.
            continue
        except BlockingIOError:
            raise BlockingIOError(f"another process is writing {folder}") from None
    try:
        yield descriptor
    finally:
        # Closing would leave it to a process that was forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def lock_folder(folder: Path, kind: int) -> int:
    """The descriptor that holds a lock of the folder of that name, as long as it is open.

    Args:
        folder: to be locked, against others who lock it.
        kind: as `fcntl.flock` takes it.

    Raises:
        FileNotFoundError or NotADirectoryError: there is no such folder.
        BlockingIOError: somebody else holds it, and `kind` says not to wait.
    """
    import fcntl

    while True:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, kind)
            # It may have been renamed, and another made, between the two calls.
            if _is_at(descriptor, folder):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether the name is still that of the open folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    # Windows opens no folders, and syncs only what may be written to.
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
