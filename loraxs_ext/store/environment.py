"""One LMDB environment as the store needs it: a map that grows by itself, forks that stay harmless, clear errors."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .gate import Gate

T = TypeVar("T")
Transaction = Any
Database = Any

# Address space, not memory or disk: the file grows with what is in it.
_FIRST_MAP = 1 << 30
_MAX_READERS = 1024
# At least what LMDB wants of its lock.mdb.
_LOCK_BYTES, _READER_BYTES = 4096, 64
# A page of data.mdb that says where the trees are: 16 bytes of header, magic, version, address and size of the map, two
# trees of 48 bytes that begin with the size of a page, the last page, the transaction.
_META = struct.Struct("=16xII16xI92xQQ")
_MAGIC = 0xBEEFC0DE
_PAGE_SIZES = [1 << i for i in range(9, 17)]
# Touches every page of the databases.
_WALK = """
import sys, lmdb
env = lmdb.open(sys.argv[1], readonly=True, lock=False, max_dbs=len(sys.argv))
for name in sys.argv[2:]:
    database = env.open_db(name.encode(), create=False)
    with env.begin(database, buffers=True) as transaction:
        for _, value in transaction.cursor():
            sum(value[::512])
"""
# A transaction of ours takes milliseconds; longer than this only a write that waits for another process.
_FORK_PATIENCE = 10.0


def load_lmdb() -> Any:
    """The lmdb package.

    Raises:
        ImportError: it is missing; the message names the extra.
    """
    try:
        import lmdb
    except ImportError:
        raise ImportError('an adapter store needs the package lmdb: pip install "loraxs-ext[serve]"') from None
    return lmdb


class Environment:
    """The LMDB environment in a folder. Safe for threads; after a fork, the child opens it anew by itself.

    Within a process a folder must be open once only: LMDB's file locks belong to the process.

    Args:
        folder: holds data.mdb, or will.
        databases: names of the databases in it; made where missing, unless `readonly`.
        readonly: never write to data.mdb.
        lock: register readers in lock.mdb, so that a writer does not reuse the pages they are reading. False, for
            readers only, leaves no trace in the folder and is right only while nobody writes.
        sync: whether a committed transaction has reached the disk; else it has reached the operating system.
        map_size: address space in bytes to begin with.

    Raises:
        FileNotFoundError: `readonly`, and there is none.
        PermissionError: lock.mdb cannot be written.
        ValueError: the file is not one of LMDB, or open in this process already.
        ImportError: lmdb is missing.
    """

    def __init__(
        self,
        folder: Path,
        databases: Sequence[str],
        *,
        readonly: bool = False,
        lock: bool = True,
        sync: bool = True,
        map_size: int = _FIRST_MAP,
    ) -> None:
        self._lmdb = load_lmdb()
        self.folder = folder
        self.readonly = readonly
        self._names = tuple(databases)
        self._options: dict[str, Any] = {"readonly": readonly, "lock": lock, "sync": sync, "metasync": sync}
        self._map_size = map_size
        self._gate = Gate()
        self._opening = threading.Lock()
        self._env: Any = None
        self._databases: dict[str, Database] = {}
        self._closed = False
        self._fork_failed = False
        self._held_for_fork = False
        self._open()
        _ENVIRONMENTS.add(self)

    def close(self) -> None:
        """Put everything on the disk and let go of the files, after whatever other threads are doing."""
        if self._closed:
            return
        with self._gate.alone():
            self._closed = True
            try:
                if self._env is not None and not self._options["sync"] and not self.readonly:
                    with self._told():
                        self._env.sync(True)
            finally:
                self._release()

    @contextmanager
    def reading(self) -> Iterator[tuple[Transaction, dict[str, Database]]]:
        """A read transaction: one state of the store. Values are views that end with it."""
        while True:
            with self._gate.shared():
                env = self._ready()
                try:
                    transaction = env.begin(buffers=True)
                except self._lmdb.MapResizedError:
                    transaction = None
                except self._lmdb.ReadersFullError:
                    # Slots of readers that were killed.
                    if not env.reader_check():
                        raise
                    transaction = env.begin(buffers=True)
                if transaction is not None:
                    with self._told(), transaction:
                        yield transaction, self._databases
                    return
            self._resize(0)

    def write(self, change: Callable[[Transaction, dict[str, Database]], T]) -> T:
        """Commit what `change` does, or nothing of it; waits for other writers.

        Args:
            change: puts and deletes; is called again where the map had to grow, so it must not do anything else.
        """
        if self.readonly:
            raise PermissionError(f"{self.folder}: opened with readonly=True, and nothing can be written")
        while True:
            with self._gate.shared():
                env = self._ready()
                try:
                    with self._told_of_disk(self.folder), env.begin(write=True, buffers=True) as transaction:
                        return change(transaction, self._databases)
                except self._lmdb.MapFullError:
                    size = 2 * env.info()["map_size"]
                except self._lmdb.MapResizedError:
                    size = 0
            self._resize(size)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """LMDB's errors as ours, but for those that are dealt with here."""
        try:
            yield
        except (self._lmdb.MapFullError, self._lmdb.MapResizedError):
            raise
        except self._lmdb.Error as reason:
            raise OSError(f"{self.folder}: {reason}") from reason

    @contextmanager
    def _told_of_disk(self, folder: Path) -> Iterator[None]:
        """The same, for what is written to `folder`: LMDB calls the end of a full disk an input/output error, too."""
        try:
            with self._told():
                yield
        except OSError as reason:
            free = shutil.disk_usage(folder).free
            raise OSError(f"{reason}; nothing of it was kept, {free / 1e6:.1f} MB are free on that disk") from reason

    @contextmanager
    def raw(self) -> Iterator[Any]:
        """The environment of py-lmdb."""
        with self._gate.shared(), self._told():
            yield self._ready()

    def copy(self, folder: Path) -> None:
        """Write data.mdb without its free pages to `folder`."""
        with self._gate.shared():
            env = self._ready()
            with self._told_of_disk(folder):
                env.copy(str(folder), compact=True)

    def _ready(self) -> Any:
        if self._closed:
            raise ValueError(f"{self.folder}: the store was closed")
        if self._fork_failed:
            raise RuntimeError(f"{self.folder}: the process was forked in the middle of a transaction; open it anew")
        if self._env is None:
            with self._opening:
                if self._env is None:
                    self._open()
        return self._env

    def _open(self) -> None:
        data, lock_file = self.folder / "data.mdb", self.folder / "lock.mdb"
        if not data.is_file() and self.readonly:
            raise FileNotFoundError(f"{self.folder}: expected an adapter store, got no data.mdb there")
        guarded = lock_file if lock_file.exists() else self.folder
        if self._options["lock"] and self.folder.exists() and not os.access(guarded, os.W_OK):
            # LMDB itself would go on without locks on a read-only file system, which others may write elsewhere.
            raise PermissionError(
                f"{guarded}: cannot be written, and readers register there. If nobody writes to the store while it is "
                f"open, open it with readonly=True, lock=False"
            )
        used = _checked_size(data, self._names) if data.exists() else 0
        if not self.readonly and data.exists():
            _fill_up(data, used)
        if self._options["lock"] and not lock_file.exists():
            _allocate(lock_file, _LOCK_BYTES + _READER_BYTES * _MAX_READERS)
        try:
            env = self._lmdb.open(
                str(self.folder),
                map_size=max(self._map_size, 2 * used),
                max_dbs=len(self._names),
                max_readers=_MAX_READERS,
                # A cached transaction would be shared with the children of a fork.
                max_spare_txns=0,
                # Point reads of a store that does not fit the memory.
                readahead=False,
                create=not self.readonly,
                mode=0o644,
                **self._options,
            )
            try:
                self._databases = {
                    name: env.open_db(name.encode(), create=not self.readonly) for name in self._names
                }  # fmt: skip
                if not self.readonly:
                    env.reader_check()
            except BaseException:
                env.close()
                raise
        except self._lmdb.Error as reason:
            if "already open in this process" in str(reason):
                raise ValueError(
                    f"{self.folder}: already open in this process, where LMDB opens it only once; use that "
                    f"AdapterStore, which threads may share, or close it first"
                ) from None
            raise ValueError(f"{self.folder}: expected an adapter store, got: {reason}") from None
        self._env = env

    def _resize(self, size: int) -> None:
        """Map `size` bytes, or with 0 as many as another process has made it."""
        with self._gate.alone():
            env = self._ready()
            # Another thread may have been here first.
            if size == 0 or size > env.info()["map_size"]:
                env.set_mapsize(size)

    def _release(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env, self._databases = None, {}

    # LMDB must not be used across a fork, and its transactions must not even be ended there.

    def _before_fork(self) -> None:
        self._held_for_fork = self._gate.enter_alone(_FORK_PATIENCE)

    def _after_fork_in_parent(self) -> None:
        if self._held_for_fork:
            self._gate.leave_alone()

    def _after_fork_in_child(self) -> None:
        self._gate, self._opening = Gate(), threading.Lock()
        if self._held_for_fork:
            self._release()
        else:
            self._fork_failed = True


def _checked_size(data: Path, databases: Sequence[str]) -> int:
    """The size of a data.mdb, with all its pages: one that is mapped and is not in the file kills who reads it.

    Raises:
        ValueError: it is none, or was cut off.
    """
    with data.open("rb") as file:
        first = file.read(_META.size)
        size = _META.unpack(first)[2] if len(first) == _META.size else 0
        # The two pages are written in turn; the later says what was committed last.
        file.seek(size)
        metas = [_META.unpack(page) for page in (first, file.read(_META.size)) if len(page) == _META.size]
        # After the pages, so that another process may go on writing.
        found = os.fstat(file.fileno()).st_size
    magics = {(magic, version) for magic, version, *_ in metas}
    if len(metas) < 2 or magics != {(_MAGIC, 1)} or size not in _PAGE_SIZES:
        raise ValueError(
            f"{data.parent}: expected an adapter store, got a data.mdb of {found} bytes that is none of LMDB"
        )
    _, _, _, last, _ = max(metas, key=lambda meta: meta[-1])
    whole = (last + 1) * size
    # LMDB may leave out pages at the end that hold nothing. Another process may die to find out.
    if found < whole:
        walk = [sys.executable, "-c", _WALK, str(data.parent), *databases]
        if subprocess.run(walk, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0:
            raise ValueError(f"{data}: expected {whole} bytes, got {found}: it was cut off, or not copied whole")
    return whole


def _fill_up(data: Path, size: int) -> None:
    """Add what a file lacks of its pages, so that none is missing, also of those that only a writer reads."""
    with data.open("r+b") as file:
        found = os.fstat(file.fileno()).st_size
        # Unlike `truncate`, never cuts off what another process writes meanwhile.
        if found < size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), found, size - found)


def _allocate(path: Path, size: int) -> None:
    """Make a file of zeros that has its place on the disk: a full disk would kill who writes to a map of it."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as reason:
        path.unlink()
        raise OSError(reason.errno, f"{reason.strerror}: {size} bytes for the locks of the store", str(path)) from None
    finally:
        os.close(descriptor)


_ENVIRONMENTS: weakref.WeakSet[Environment] = weakref.WeakSet()


def _every(step: Callable[[Environment], None]) -> Callable[[], None]:
    def run() -> None:
        for environment in list(_ENVIRONMENTS):
            step(environment)

    return run


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_every(Environment._before_fork),
        after_in_parent=_every(Environment._after_fork_in_parent),
        after_in_child=_every(Environment._after_fork_in_child),
    )
