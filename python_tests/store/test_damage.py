"""A data.mdb that is cut off or garbled, and a disk that is full: a clear error, nothing lost, nothing half-written."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraxs_ext.store import AdapterStore
from loraxs_ext.store.environment import Environment

from . import stores

pytest.importorskip("lmdb")
ROOT = Path(__file__).parents[2]
PAGE = 4096
LAST_PAGE = 136  # where a page that says where the trees are has the number of the last


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two hundred adapters, closed."""
    with stores.create(tmp_path / "store", keep=2) as made:
        made.put_many([stores.row(f"n{i:03}", i, rank=4) for i in range(200)])
        made.put(stores.row("n000", 1000))
    return tmp_path / "store"


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def zeros_at(at: int, count: int) -> Callable[[Path], None]:
    return lambda path: overwrite(path, at, bytes(count))


@pytest.mark.parametrize("readonly", [True, False], ids=["to read", "to write"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, 0), "expected an adapter store, got a data.mdb of 0 bytes"),
        (lambda path: os.truncate(path, 100), "expected an adapter store, got a data.mdb of 100 bytes"),
        (lambda path: os.truncate(path, PAGE), "expected an adapter store, got a data.mdb of 4096 bytes"),
        (lambda path: os.truncate(path, 2 * PAGE), r"expected \d+ bytes, got 8192: it was cut off, or not copied"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), r"expected \d+ bytes, got \d+: it was cut off"),
        (
            lambda path: path.write_bytes(b"not a database" * 5000),
            "expected an adapter store, got a data.mdb of 70000 bytes",
        ),
        (zeros_at(0, PAGE), "expected an adapter store, got a data.mdb of"),
        (zeros_at(PAGE, PAGE), "expected an adapter store, got a data.mdb of"),
        (zeros_at(40, 4), "expected an adapter store, got a data.mdb of"),  # the size of a page, by which LMDB divides
        (zeros_at(2 * PAGE, 1 << 20), "expected an adapter store, got"),
    ],
    ids=[
        "empty",
        "100 bytes",
        "a page",
        "two pages",
        "half",
        "text",
        "first",
        "second",
        "size",
        "zeros",
    ],
)
def test_a_damaged_file_is_refused(store: Path, damage: Callable[[Path], None], message: str, readonly: bool) -> None:
    data = store / "data.mdb"
    size = data.stat().st_size
    damage(data)
    os.truncate(data, min(size, data.stat().st_size))
    before = data.read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            AdapterStore(store, readonly=readonly)
    assert data.read_bytes() == before


def test_a_file_that_lacks_its_last_pages_never_kills(store: Path) -> None:
    data = store / "data.mdb"
    whole = data.read_bytes()
    refused = 0
    for pages in range(1, 9):
        data.write_bytes(whole[: -pages * PAGE])
        try:
            with AdapterStore(store) as opened:
                # Those pages held nothing that is read.
                assert len(opened) == 200 and opened.check() == []
                with contextlib.suppress(OSError):
                    opened.put(stores.row("more"))
        except ValueError as reason:
            assert "it was cut off" in str(reason)
            refused += 1
    assert 0 < refused < 8


def test_a_file_that_lacks_empty_pages_only_is_whole(store: Path) -> None:
    data = store / "data.mdb"
    for page in (0, PAGE):
        (last,) = struct.unpack("=Q", data.read_bytes()[page + LAST_PAGE :][:8])
        overwrite(data, page + LAST_PAGE, struct.pack("=Q", last + 3))
    for readonly in (True, False):
        with AdapterStore(store, readonly=readonly) as opened:
            assert len(opened) == 200 and opened.check() == []
            if not readonly:
                opened.put(stores.row("more"))
    with AdapterStore(store) as opened:
        assert len(opened) == 201 and opened.check() == []


def test_files_that_may_not_grow(store: Path) -> None:
    command = [sys.executable, "-m", "python_tests.store.full_disk", str(store.parent)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found["said"]) == {"put", "compact", "export", "create"} and found["whole"] is True
    for action, said in found["said"].items():
        assert str(store.parent) in said
        assert ("nothing of it was kept" in said) == (action in ("put", "compact"))
    assert os.listdir(store.parent) == ["store"]
    with AdapterStore(store) as opened:
        assert list(opened) == sorted([*found["names"], "last"]) and opened.check() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounts need rights")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    names = []
    with stores.create(small_disk / "store") as store:
        with pytest.raises(OSError, match="nothing of it was kept, 0.0 MB are free on that disk"):
            for i in range(10_000):
                store.put(stores.row(f"{i}"))
                names.append(f"{i}")
        fill(small_disk)
        assert list(store) == sorted(names) and store.check() == []
        with pytest.raises(OSError, match="for the locks of the store"):
            stores.create(small_disk / "another")
        with pytest.raises(OSError, match="nothing of it was kept"):
            store.compact(small_disk / "another")
        assert sorted(os.listdir(small_disk)) == ["filled", "store"]
    # Its lock.mdb has its place, also for readers that have not come yet.
    with AdapterStore(small_disk / "store", readonly=True) as reader:
        assert len(reader) == len(names)
    (small_disk / "filled").unlink()
    with AdapterStore(small_disk / "store") as store:
        store.put(stores.row("last"))
        assert list(store) == sorted([*names, "last"]) and store.check() == []


def fill(folder: Path) -> None:
    with (folder / "filled").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(512)):
                pass
        except OSError:
            pass


def test_an_environment_says_what_it_could_not_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lmdb

    environment = Environment(tmp_path, ("a",), sync=False)

    class Failing:
        def sync(self, force: bool) -> None:
            raise lmdb.DiskError("no space")

        def close(self) -> None:
            real.close()

    real = environment._env
    monkeypatch.setattr(environment, "_env", Failing())
    with pytest.raises(OSError, match="no space"):
        environment.close()
    Environment(tmp_path, ("a",)).close()  # It has let go of the files.
