"""What is written: whole folders or none, and safetensors files that never lie in memory as a whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A folder that holds one of these is one that this module may replace.
_MARKS = ("config.json", "adapter_config.json")

# Names of dtypes in a safetensors header.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` to write to; synced and renamed to `path` on success, removed on failure.

    A killed process leaves the temporary folder, `.NAME.partial`, behind; the next call for the same path starts it
    anew. A lock keeps two processes from writing to it at once.

    Args:
        path: folder to be made.
        overwrite: whether it may replace a folder of a model or an adapter that holds no other adapter.

    Raises:
        FileExistsError: `path` exists and may not be replaced.
        BlockingIOError: another process is writing it.
    """
    path = path.absolute()
    _check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    lock = _lock(temporary)
    try:
        # Again, now that nobody else writes: another may have finished since.
        _check_free(path, overwrite)
        for stale in list(temporary.iterdir()):
            shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
        yield temporary
        _sync(temporary)
        _check_free(path, overwrite)
        old = path.with_name(f".{path.name}.replaced")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(temporary, path)
        _sync_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; name another folder, or allow it to be overwritten")
    if path.is_symlink() or not any((path / mark).is_file() for mark in _MARKS):
        raise FileExistsError(f"{path} is not the folder of a model or an adapter, and is not overwritten")
    inner = next(path.glob(f"*/**/{_MARKS[1]}"), None)
    if inner is not None:
        raise FileExistsError(f"{path} also holds the adapter {inner.parent.relative_to(path)}, and is not overwritten")


def _lock(folder: Path) -> int:
    """Make `folder` and lock it for this process; the descriptor that holds the lock."""
    # Not everywhere: the package is imported on Windows too.
    import fcntl

    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            # Another, who had it first, has finished and renamed it.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been finished and renamed between the two calls; then it is not ours.
            if os.fstat(descriptor).st_ino == os.stat(folder).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(f"another process is writing {folder}") from None
        os.close(descriptor)


def _sync(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(parent))


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Entry(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: in the file.
        dtype: as a safetensors header names it.
        shape: of the tensor.
        nbytes: it will take.
        make: returns it, when its turn has come; nothing keeps it afterwards.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], Tensor]


def entry(name: str, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], Tensor]) -> Entry:
    """The entry of a floating-point tensor."""
    return Entry(name, DTYPES[dtype], tuple(shape), dtype.itemsize * math.prod(shape), make)


def write_shard(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> Iterator[Entry]:
    """Write a safetensors file, tensor by tensor.

    Args:
        path: of the file.
        entries: in the order of their bytes in the file.
        metadata: text fields of the header.

    Yields:
        Each entry once it is written.

    Raises:
        ValueError: a tensor is not what its entry says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for one in entries:
        header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [end, end + one.nbytes]}
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in entries:
            data: Any = one.make().detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            if data.nbytes != one.nbytes:
                raise ValueError(f"{one.name}: expected {one.nbytes} bytes, got {data.nbytes}")
            file.write(memoryview(data))
            del data
            yield one
