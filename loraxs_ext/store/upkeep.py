"""Is everything in a store whole, and how much room does it take?"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from .environment import Database, Environment, Transaction
from .layout import RowLayout
from .names import encode_name
from .record import DamagedRecord, decode, version_of
from .row import AdapterRow

# Adapters between two calls of `progress`.
_STEP = 256
T = TypeVar("T")


class Statistics(NamedTuple):
    """Sizes of a store.

    Attributes:
        adapters, versions, layouts: how many adapters, older versions of them, and layouts there are.
        nbytes: of the file up to its last page.
        free_bytes: of pages in it that hold nothing now; the next writes use them.
        map_size: address space mapped now.
        readers: read transactions at this moment, over all processes.
    """

    adapters: int
    versions: int
    layouts: int
    nbytes: int
    free_bytes: int
    map_size: int
    readers: int

    @property
    def bytes_per_adapter(self) -> float:
        """Bytes in use, all in all, by the number of adapters; 0 for an empty store."""
        return (self.nbytes - self.free_bytes) / self.adapters if self.adapters else 0.0


def statistics(environment: Environment) -> Statistics:
    """Measure a store."""
    with environment.reading() as (txn, dbs), environment.raw() as env:
        info = env.info()
        parts = {name: txn.stat(db) for name, db in dbs.items()}
        page = parts["adapters"]["psize"]
        total = info["last_pgno"] + 1
        kinds = ("branch_pages", "leaf_pages", "overflow_pages")
        # Two pages say where the trees begin.
        used = 2 + sum(part[kind] for part in (env.stat(), *parts.values()) for kind in kinds)
        return Statistics(
            parts["adapters"]["entries"],
            parts["history"]["entries"],
            parts["layouts"]["entries"],
            total * page,
            max(0, total - used) * page,
            info["map_size"],
            # A line for each, below a heading; this transaction is one of them.
            max(0, len(env.readers().strip().splitlines()) - 2),
        )


def check(environment: Environment, basis: bytes, keep: int, progress: Callable[[int], None] | None) -> list[str]:
    """What is wrong with a store, a sentence each; see `AdapterStore.check`."""
    found = _Findings(str(environment.folder))
    try:
        with environment.reading() as (txn, dbs):
            _check(txn, dbs, basis, keep, found, progress or (lambda _: None))
    except OSError as reason:
        found.problems.append(str(reason))
    return found.problems


class _Findings:
    """Collects what is wrong instead of stopping at it."""

    def __init__(self, store: str) -> None:
        self.store = store
        self.problems: list[str] = []

    def add(self, what: str) -> None:
        self.problems.append(f"store {self.store}: {what}")

    def examine(self, what: str, step: Callable[..., T], *arguments: Any) -> T | None:
        """What `step` returns; None if it refuses, for `what`."""
        try:
            return step(*arguments)
        except DamagedRecord as reason:
            self.problems.append(str(reason))
        except (ValueError, struct.error) as reason:
            self.add(f"{what}: {reason}")
        return None


def _check(
    txn: Transaction,
    dbs: dict[str, Database],
    basis: bytes,
    keep: int,
    found: _Findings,
    progress: Callable[[int], None],
) -> None:
    layouts: dict[bytes, RowLayout] = {}
    for key, value in _entries(txn, dbs["layouts"]):
        layout = found.examine(f"layout {key.hex()}", _layout, key, value)
        if layout is not None:
            layouts[key] = layout

    def read(key: bytes, record: Any) -> AdapterRow:
        name = key.decode()
        encode_name(name)
        return decode(name, record, basis, layouts.get, found.store)

    done = 0
    for key, value in _entries(txn, dbs["adapters"]):
        found.examine(f"key {key!r}", read, key, value)
        if txn.get(key, db=dbs["retired"]) is not None:
            found.add(f"key {key!r}: expected an adapter or a deleted one, got both")
        done += 1
        if done % _STEP == 0:
            progress(_STEP)
    progress(done % _STEP)
    if done != (expected := txn.stat(dbs["adapters"])["entries"]):
        found.add(f"expected {expected} adapters, got {done}")
    older: Counter[bytes] = Counter()
    for key, value in _entries(txn, dbs["history"]):
        name, version = key[:-9], int.from_bytes(key[-8:], "big")
        older[name] += 1
        row = found.examine(f"key {key!r}", read, name, value)
        current = txn.get(name, db=dbs["adapters"])
        newest = 0 if current is None else found.examine(f"key {name!r}", version_of, current) or 0
        if row is not None and not row.version == version < newest:
            found.add(f"key {key!r}: expected an older version than {newest}, got {row.version}")
    for name, count in older.items():
        if count >= keep:
            found.add(f"key {name!r}: expected at most {keep - 1} older versions, got {count}")


def _entries(txn: Transaction, db: Database) -> Iterator[tuple[bytes, Any]]:
    with txn.cursor(db=db) as cursor:
        for key, value in cursor:
            yield bytes(key), value


def _layout(digest: bytes, text: Any) -> RowLayout:
    layout = RowLayout.from_json(bytes(text))
    if layout.digest != digest:
        raise ValueError(f"expected the digest {digest.hex()}, got {layout.digest.hex()}")
    return layout
