"""The catalogue on disk: adapter name → one contiguous record, in LMDB."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from loraxs_ext.files import atomic_folder

from .environment import Database, Environment, Transaction
from .layout import RowLayout
from .manifest import Manifest
from .names import encode_name, encode_text
from .record import DamagedRecord, Draft, decode, encode, version_of
from .row import AdapterRow
from .upkeep import Statistics, check, statistics

_PAGE = 1024
_COUNTER = struct.Struct(">Q")
# adapters: name → record. history: name, 0, version → record. retired: name of a deleted adapter → its last version.
# layouts: digest → JSON. about: the manifest and the options of the store.
_DATABASES = ("adapters", "history", "retired", "layouts", "about")


class VersionConflict(RuntimeError):
    """The adapter is at another version than the caller expected.

    Attributes:
        expected: by the caller; 0 for no adapter.
        found: in the store; 0 for no adapter.
    """

    def __init__(self, name: str, expected: int, found: int) -> None:
        super().__init__(f"adapter {name!r}: expected version {expected}, got {found} (0 is none)")
        self.expected, self.found = expected, found


class AdapterStore:
    """A catalogue of adapters on one basis: many processes read it beside one that writes; a `RowSource`.

    A put or delete is there as a whole or not at all, for every reader and after any crash. What was committed survives
    a killed process always, and a power failure with `sync=True`. Writers wait for each other, each for the length of
    one transaction. One object serves all threads of a process, and works on after a fork. The folder must be on a
    local disk, and of known origin: records are checked when they are read, LMDB's own pages are not.

    Args:
        path: folder of `AdapterStore.create`.
        readonly: never write; several such stores and one other may be open, in different processes.
        lock: False, only with `readonly`, for a folder or file system that cannot be written. Right only while nobody
            writes to the store anywhere, because readers then are invisible to a writer.
        sync: False for a store that is being filled: a commit then reaches the operating system and not the disk. As
            safe against a killed process, but a power failure before `flush` may cost the whole store.
        basis: fingerprint of the base weights that the store has to be for; None for any.
        map_size: address space in bytes to begin with; it grows by itself.

    Attributes:
        path: of the folder.
        manifest: the basis of all adapters.
        keep: how many versions of an adapter are kept, the current one included.

    Raises:
        FileNotFoundError: there is no store.
        PermissionError: its locks cannot be written.
        ValueError: it is damaged, of another basis, or open in this process already.
        ImportError: lmdb is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        lock: bool = True,
        sync: bool = True,
        basis: str | None = None,
        map_size: int = 1 << 30,
    ) -> None:
        if not lock and not readonly:
            raise ValueError("lock: expected True for a store that is written, got False")
        self.path = Path(path)
        if not (self.path / "data.mdb").is_file():
            raise FileNotFoundError(f"{self.path}: expected an adapter store, got no data.mdb there")
        self._environment = Environment(
            self.path, _DATABASES, readonly=readonly, lock=lock, sync=sync, map_size=map_size
        )
        # By digest, for a digest says all about a layout.
        self._layouts: dict[bytes, RowLayout] = {}
        self._fitting: set[bytes] = set()
        try:
            self.manifest, self.keep = self._read_about()
            if basis is not None and basis != self.manifest.fingerprint:
                found = self.manifest.fingerprint or "an unknown one"
                raise ValueError(f"{self.path}: basis: expected adapters of the base {basis}, got those of {found}")
        except BaseException:
            self._environment.close()
            raise

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], manifest: Manifest, *, keep: int = 1, sync: bool = True
    ) -> AdapterStore:
        """Make an empty store; its folder appears whole or not at all.

        Args:
            path: folder to be made.
            manifest: the basis of all adapters that will be in it.
            keep: versions of an adapter to keep, the current one included.
            sync: as for opening.

        Raises:
            FileExistsError: there is something at `path`.
            ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 version, got {keep}")
        target = Path(path)
        with atomic_folder(target) as folder:
            environment = Environment(folder, _DATABASES)
            text, sketches = manifest.to_bytes()
            about = {b"manifest": text, b"sketches": sketches, b"keep": _COUNTER.pack(keep)}
            try:
                environment.write(lambda txn, dbs: _put_all(txn, dbs["about"], about))
            finally:
                environment.close()
        return cls(target, sync=sync)

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put on the disk what is not there yet, and let go of the files."""
        self._environment.close()

    def flush(self) -> None:
        """Wait until everything committed is on the disk; of use with `sync=False`."""
        with self._environment.raw() as env:
            env.sync(True)

    # Reading.

    def version(self, name: str) -> int:
        """The current version of the adapter.

        Raises:
            KeyError: there is none.
        """
        return self.current_versions([name])[0]

    def current_versions(self, names: Sequence[str]) -> list[int]:
        """`version` of several adapters, in one state of the store.

        Raises:
            KeyError: one of them is not there.
        """
        keys = [encode_name(name) for name in names]
        with self._environment.reading() as (txn, dbs):
            records = [txn.get(key, db=dbs["adapters"]) for key in keys]
            return [version_of(self._found(name, record)) for name, record in zip(names, records, strict=True)]

    def row(self, name: str, version: int | None = None) -> AdapterRow:
        """The adapter; its numbers are a copy and stay valid.

        Args:
            name: of the adapter.
            version: one that is kept; None for the current one.

        Raises:
            KeyError: there is no such adapter, or no such version of it any more.
            DamagedRecord: its bytes are not those that were put.
        """
        key = encode_name(name)
        with self._environment.reading() as (txn, dbs):
            record = txn.get(key, db=dbs["adapters"])
            if version is not None and (record is None or version_of(record) != version):
                record = txn.get(_versioned(key, version), db=dbs["history"])
            found = self._found(name, record, version)
            return decode(name, found, self.manifest.digest, lambda d: self._layout(d, txn, dbs), str(self.path))

    def versions(self, name: str) -> list[int]:
        """All versions that are kept, the current one last.

        Raises:
            KeyError: there is no such adapter.
        """
        key = encode_name(name)
        with self._environment.reading() as (txn, dbs):
            current = version_of(self._found(name, txn.get(key, db=dbs["adapters"])))
            return [*_older(txn, dbs, key), current]

    def __contains__(self, name: object) -> bool:
        key = encode_name(name)  # type: ignore[arg-type]
        with self._environment.reading() as (txn, dbs):
            return txn.get(key, db=dbs["adapters"]) is not None

    def __len__(self) -> int:
        with self._environment.reading() as (txn, dbs):
            return int(txn.stat(dbs["adapters"])["entries"])

    def names(self, prefix: str = "", after: str | None = None, limit: int | None = None) -> Iterator[str]:
        """Names in the order of their UTF-8 bytes, read as they are asked for: later ones see later changes.

        Args:
            prefix: only names that begin with it.
            after: only names beyond this one, to go on where an earlier call stopped.
            limit: at most so many.

        Raises:
            ValueError: `prefix` or `after` is not text that UTF-8 can hold.
        """
        start, position = encode_text("prefix", prefix), None if after is None else encode_text("after", after)
        left = limit
        while left is None or left > 0:
            size = _PAGE if left is None else min(left, _PAGE)
            with self._environment.reading() as (txn, dbs):
                page = _keys(txn, dbs["adapters"], start, position, size)
            for key in page:
                yield key.decode()
            if len(page) < size:
                return
            position = page[-1]
            left = None if left is None else left - size

    def __iter__(self) -> Iterator[str]:
        return self.names()

    # Writing.

    def put(self, row: AdapterRow, *, expected_version: int | None = None) -> int:
        """Store an adapter, or replace the one of its name.

        Args:
            row: its name, layout, numbers and steps; `row.version` is not read.
            expected_version: what the adapter must be at, 0 for no adapter; None for whatever it is.

        Returns:
            The new version: one more than the last that this name ever had.

        Raises:
            VersionConflict: the adapter is at another version; nothing has changed.
            ValueError or TypeError: the row does not fit the store; says how.
        """
        return self._write([row], expected_version)[0]

    def put_many(self, rows: Iterable[AdapterRow]) -> list[int]:
        """`put` of several adapters in one transaction: all of them or none. The new versions, in order."""
        return self._write(list(rows), None)

    def delete(self, name: str, *, expected_version: int | None = None) -> None:
        """Forget an adapter and its older versions; a later one of the same name goes on counting versions.

        Raises:
            KeyError: there is none.
            VersionConflict: it is at another version; nothing has changed.
        """
        key = encode_name(name)

        def change(txn: Transaction, dbs: dict[str, Database]) -> None:
            current = version_of(self._found(name, txn.get(key, db=dbs["adapters"])))
            _expect(name, expected_version, current)
            for version in _older(txn, dbs, key):
                txn.delete(_versioned(key, version), db=dbs["history"])
            txn.delete(key, db=dbs["adapters"])
            txn.put(key, _COUNTER.pack(current), db=dbs["retired"])

        self._environment.write(change)

    def rollback(self, name: str, version: int) -> int:
        """Make the content of an older version the current one, as a new version; returns that.

        Raises:
            KeyError: there is no such adapter, or no such version of it any more.
        """
        return self.put(self.row(name, version))

    # Upkeep.

    def check(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """Decode every record and compare what belongs together, in one state of the store.

        Args:
            progress: called with the number of adapters seen since the last call. Meanwhile a writer can work, but
                cannot use the room of what it replaces.

        Returns:
            What is wrong, a sentence each; nothing for a store that is whole.
        """
        return check(self._environment, self.manifest.digest, self.keep, progress)

    def compact(self, target: str | os.PathLike[str]) -> None:
        """Write a copy of the present state without free pages; it appears whole or not at all.

        Args:
            target: folder to be made. To put it in the place of this one, no process may have either open.

        Raises:
            FileExistsError: there is something at `target`.
        """
        with atomic_folder(Path(target)) as folder, self._environment.raw() as env:
            env.copy(str(folder), compact=True)

    def stat(self) -> Statistics:
        """How many adapters there are, and the room they take."""
        return statistics(self._environment)

    # Inside.

    def _write(self, rows: list[AdapterRow], expected: int | None) -> list[int]:
        # All that takes time, and all that may be refused, before the transaction.
        for row in rows:
            self._check_layout(row)
        entries = [(encode_name(row.name), encode(row, self.manifest.digest)) for row in rows]
        layouts = {row.layout.digest: row.layout for row in rows}

        def change(txn: Transaction, dbs: dict[str, Database]) -> list[int]:
            for digest, layout in layouts.items():
                txn.put(digest, layout.to_json().encode(), db=dbs["layouts"], overwrite=False)
            return [self._replace(txn, dbs, key, draft, expected) for key, draft in entries]

        return self._environment.write(change)

    def _replace(
        self, txn: Transaction, dbs: dict[str, Database], key: bytes, draft: Draft, expected: int | None
    ) -> int:
        old = txn.get(key, db=dbs["adapters"])
        current = 0 if old is None else version_of(old)
        _expect(draft.name, expected, current)
        last = current
        if old is None:
            retired = txn.pop(key, db=dbs["retired"])
            last = 0 if retired is None else _COUNTER.unpack(retired)[0]
        elif self.keep > 1:
            txn.put(_versioned(key, current), bytes(old), db=dbs["history"])
            older = _older(txn, dbs, key)
            for version in older[: max(0, len(older) - self.keep + 1)]:
                txn.delete(_versioned(key, version), db=dbs["history"])
        txn.put(key, draft.seal(last + 1), db=dbs["adapters"])
        return last + 1

    def _check_layout(self, row: AdapterRow) -> None:
        """Raise unless the modules and ranks are those of the basis."""
        if row.layout.digest in self._fitting:
            return
        ranks = self.manifest.ranks
        unknown = [segment.key for segment in row.layout.segments if segment.key not in ranks]
        if unknown:
            raise ValueError(
                f"store {self.path}: adapter {row.name!r}: expected modules of its basis, which has {len(ranks)}, got "
                f"{len(unknown)} of {len(row.layout.segments)} that it does not know, one of them {unknown[0]!r}"
            )
        for key, r, _ in row.layout.segments:
            if r > ranks[key]:
                raise ValueError(
                    f"store {self.path}: adapter {row.name!r}: {key}: expected a rank of at most {ranks[key]}, got {r}"
                )
        self._fitting.add(row.layout.digest)

    def _found(self, name: str, record: Any, version: int | None = None) -> Any:
        if record is None:
            what = f"{name!r}" if version is None else f"{name!r} of version {version}"
            raise KeyError(f"store {self.path}: there is no adapter {what}")
        return record

    def _layout(self, digest: bytes, txn: Transaction, dbs: dict[str, Database]) -> RowLayout | None:
        layout = self._layouts.get(digest)
        if layout is None:
            text = txn.get(digest, db=dbs["layouts"])
            if text is None:
                return None
            try:
                layout = RowLayout.from_json(bytes(text))
            except ValueError as reason:
                raise DamagedRecord(f"store {self.path}: layout {digest.hex()}: {reason}") from None
            if layout.digest != digest:
                raise DamagedRecord(f"store {self.path}: expected the layout {digest.hex()}, got {layout.digest.hex()}")
            self._layouts[digest] = layout
        return layout

    def _read_about(self) -> tuple[Manifest, int]:
        with self._environment.reading() as (txn, dbs):
            found = {name: txn.get(name, db=dbs["about"]) for name in (b"manifest", b"sketches", b"keep")}
            if None in found.values() or len(found[b"keep"]) != _COUNTER.size:
                raise ValueError(f"{self.path}: expected an adapter store, got an LMDB file without a manifest")
            parts = {name: bytes(value) for name, value in found.items()}
        try:
            manifest = Manifest.from_bytes(parts[b"manifest"], parts[b"sketches"])
        except ValueError as reason:
            raise ValueError(f"{self.path}: {reason}") from None
        return manifest, _COUNTER.unpack(parts[b"keep"])[0]


def _versioned(key: bytes, version: int) -> bytes:
    """The key of an older version in the history; a name holds no zero byte."""
    # What is no version of anything has the key of nothing.
    return b"%b\0%b" % (key, _COUNTER.pack(version)) if 0 < version < 1 << 64 else b"\0"


def _older(txn: Transaction, dbs: dict[str, Database], key: bytes) -> list[int]:
    """The older versions that are kept, in order."""
    prefix = key + b"\0"
    found = []
    with txn.cursor(db=dbs["history"]) as cursor:
        more = cursor.set_range(prefix)
        while more and bytes(cursor.key()).startswith(prefix):
            found.append(_COUNTER.unpack(cursor.key()[len(prefix) :])[0])
            more = cursor.next()
    return found


def _expect(name: str, expected: int | None, current: int) -> None:
    if expected is not None and expected != current:
        raise VersionConflict(name, expected, current)


def _keys(txn: Transaction, db: Database, prefix: bytes, after: bytes | None, size: int) -> list[bytes]:
    """Up to `size` keys with this prefix, beyond `after`."""
    found: list[bytes] = []
    beyond = after is not None and after >= prefix
    with txn.cursor(db=db) as cursor:
        more = cursor.set_range(after if beyond else prefix)
        if more and beyond and bytes(cursor.key()) == after:
            more = cursor.next()
        while more and len(found) < size and (key := bytes(cursor.key())).startswith(prefix):
            found.append(key)
            more = cursor.next()
    return found


def _put_all(txn: Transaction, db: Database, entries: dict[bytes, bytes]) -> None:
    for key, value in entries.items():
        txn.put(key, value, db=db)
