"""Stores shared by processes and threads: one writer beside many readers, forks, growing maps, folders read only."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraxs_ext.store import AdapterRow, AdapterStore, RowLayout, Segment

from . import stores

pytest.importorskip("lmdb")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a child process; its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def ended_well(*pids: int) -> bool:
    return all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids)


def uniform(name: str, value: int) -> AdapterRow:
    """A row whose numbers are all the same, so that a mixture of two of them shows."""
    return AdapterRow(name, 0, stores.layout(), torch.full((stores.layout().size,), float(value)))


def test_readers_beside_a_writer_see_whole_adapters_and_versions_that_grow(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with stores.create(path) as store:
        store.put_many([uniform("a", 1), uniform("b", 1)])

    def read() -> None:
        with AdapterStore(path, readonly=True) as store:
            last, until = 0, time.monotonic() + 60
            while last < 300:
                row = store.row("a")
                assert row.version >= last and (row.numbers == row.version).all()
                last = row.version
                assert store.version("b") >= last
                assert time.monotonic() < until

    readers = [forked(read) for _ in range(3)]
    with AdapterStore(path, sync=False) as store:
        for version in range(2, 301):
            assert store.put_many([uniform("b", version), uniform("a", version)]) == [version, version]
    assert ended_well(*readers)


def test_writers_in_several_processes_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "store"
    stores.create(path).close()

    def write() -> None:
        with AdapterStore(path, sync=False) as store:
            for value in range(50):
                store.put(uniform("a", value))

    assert ended_well(*[forked(write) for _ in range(3)])
    with AdapterStore(path) as store:
        assert store.version("a") == 150
        assert store.check() == []


def test_one_object_works_on_both_sides_of_a_fork(tmp_path: Path) -> None:
    with stores.create(tmp_path / "store") as store:
        store.put(uniform("a", 1))
        stop = threading.Event()

        def read_on() -> None:
            while not stop.is_set():
                assert (store.row("a").numbers >= 1).all()

        # Threads that hold transactions whenever the fork may come.
        threads = [threading.Thread(target=read_on) for _ in range(3)]
        for thread in threads:
            thread.start()

        def child() -> None:
            assert store.version("a") >= 1
            store.put(uniform("a", 2))
            assert (store.row("a").numbers == 2).all()

        try:
            for count in range(10):
                assert ended_well(forked(child))
                assert store.version("a") == 2 + count
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert store.stat().readers == 0
        assert store.check() == []


def test_a_fork_in_the_middle_of_a_transaction_is_refused_in_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraxs_ext.store.environment._FORK_PATIENCE", 0.1)
    with stores.create(tmp_path / "store") as store:
        store.put(uniform("a", 1))

        def child() -> None:
            with pytest.raises(RuntimeError, match="forked in the middle of a transaction"):
                store.version("a")

        results: list[bool] = []
        assert store.check(lambda _: results.append(ended_well(forked(child)))) == []
        assert results == [True]
        assert store.put(uniform("a", 2)) == 2


def test_the_map_grows_under_a_writer_and_its_threads_and_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "store"
    large = RowLayout([Segment(key, 64, 1.0) for key in stores.KEYS])
    manifest = stores.manifest(rank=64)
    AdapterStore.create(path, manifest).close()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def read() -> None:
        with AdapterStore(path, readonly=True, map_size=1 << 20) as store:
            there.send("open")
            assert there.recv() == "grown"
            assert (store.row("last").numbers == 7).all()
            there.send("read")
            assert there.recv() == "grown again"
            # This one has not seen the second growth, and writes nothing itself.
            assert (store.row("more 99").numbers == 8).all()

    reader = forked(read)
    assert here.recv() == "open"
    with AdapterStore(path, sync=False, map_size=1 << 20) as store:
        assert store.stat().map_size < 2 << 20
        stop = threading.Event()
        failures: list[Any] = []

        def read_on() -> None:
            try:
                while not stop.is_set():
                    assert all((store.row(name).numbers == 5).all() for name in store.names("x", limit=3))
            except BaseException as reason:
                failures.append(reason)

        threads = [threading.Thread(target=read_on) for _ in range(2)]
        for thread in threads:
            thread.start()
        fives = torch.full((large.size,), 5.0)
        for i in range(60):
            store.put_many([AdapterRow(f"x{i} {j}", 0, large, fives) for j in range(4)])
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.stat().map_size >= store.stat().nbytes > 8 << 20
        store.put(AdapterRow("last", 0, large, torch.full((large.size,), 7.0)))
        here.send("grown")
        assert here.recv() == "read"
        store.put_many([AdapterRow(f"more {i}", 0, large, torch.full((large.size,), 8.0)) for i in range(500)])
        here.send("grown again")
        assert ended_well(reader)
        assert store.check() == []


def test_a_reader_that_was_killed_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with stores.create(path) as store:
        store.put(uniform("a", 1))
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def hang() -> None:
        with AdapterStore(path, readonly=True) as store:
            store.check(lambda _: (there.send("inside"), time.sleep(60)))  # type: ignore[func-returns-value]

    pid = forked(hang)
    assert here.recv() == "inside"
    with AdapterStore(path) as store:
        assert store.stat().readers == 1
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    with AdapterStore(path) as store:
        assert store.stat().readers == 0


def test_a_folder_is_open_once_in_a_process(tmp_path: Path) -> None:
    with stores.create(tmp_path / "store"):
        with pytest.raises(ValueError, match="already open in this process.* close it first"):
            AdapterStore(tmp_path / "store", readonly=True)
    AdapterStore(tmp_path / "store").close()


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = stores.create(tmp_path / "store")
    store.close()
    store.close()
    with pytest.raises(ValueError, match="the store was closed"):
        store.version("a")


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    with stores.create(tmp_path / "store") as store:
        store.put(uniform("a", 1))
    before = (tmp_path / "store" / "data.mdb").read_bytes()
    with AdapterStore(tmp_path / "store", readonly=True) as store:
        for call in (lambda: store.put(uniform("a", 2)), lambda: store.delete("a"), lambda: store.rollback("a", 1)):
            with pytest.raises(PermissionError, match="readonly=True"):
                call()
        assert store.version("a") == 1
    assert (tmp_path / "store" / "data.mdb").read_bytes() == before


def test_a_folder_that_cannot_be_written_wants_lock_false_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    with stores.create(path) as store:
        store.put(uniform("a", 1))
    (path / "lock.mdb").unlink()
    # Root may write everywhere but on a read-only file system: say what the system would say there.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="readonly=True, lock=False"):
        AdapterStore(path, readonly=True)
    path.chmod(0o555)
    try:
        with AdapterStore(path, readonly=True, lock=False) as store:
            assert (store.row("a").numbers == 1).all()
            assert store.check() == [] and list(store) == ["a"]
        assert [file.name for file in path.iterdir()] == ["data.mdb"]
    finally:
        path.chmod(0o755)
    with pytest.raises(ValueError, match="lock: expected True for a store that is written"):
        AdapterStore(path, lock=False)


def test_compaction_while_others_read_and_write(tmp_path: Path) -> None:
    with stores.create(tmp_path / "store", keep=2) as store:
        store.put_many([uniform(f"{i:04}", 1) for i in range(2000)])
        for i in range(1500):
            if i % 100 == 0:
                store.put_many([uniform(f"{j:04}", 2) for j in range(1500, 2000)])
        store.put(uniform("gone", 1))
        store.delete("gone")
        stop = threading.Event()

        def write_on() -> None:
            while not stop.is_set():
                store.put(uniform("moving", 1))

        thread = threading.Thread(target=write_on)
        thread.start()
        store.compact(tmp_path / "small")
        stop.set()
        thread.join()
        with AdapterStore(tmp_path / "small") as small:
            assert small.check() == []
            assert small.stat().nbytes < store.stat().nbytes
            assert small.stat().free_bytes < 65536
            assert small.keep == 2 and small.manifest.digest == store.manifest.digest
            assert all(stores.same(small.row(name), store.row(name)) for name in store.names("0"))
            assert small.versions("1999") == store.versions("1999")
            assert small.put(uniform("gone", 1)) == 2
        with pytest.raises(FileExistsError):
            store.compact(tmp_path / "small")


def test_without_lmdb_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.create(tmp_path / "store").close()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r'pip install "loraxs-ext\[serve\]"'):
        AdapterStore(tmp_path / "store")
