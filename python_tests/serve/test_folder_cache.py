"""Folders made once, never half, never removed from under a user."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from loraxs_ext.files import atomic_folder
from loraxs_ext.serve.vllm.folder_cache import FolderCache

SIZE = 1000


def make(path: Path) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "data").write_bytes(b"x" * SIZE)


def names(cache: FolderCache) -> set[str]:
    return {path.name for path in cache.root.iterdir()}


def touch(cache: FolderCache, digest: str) -> Path:
    with cache.hold(digest, make) as folder:
        # Of two folders touched within one tick of the clock, none is the older.
        time.sleep(0.02)
        return folder


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path / "cache", 3 * SIZE)
    for digest in ("a", "b", "c"):
        assert (touch(cache, digest) / "data").stat().st_size == SIZE
    touch(cache, "a")
    touch(cache, "d")
    assert names(cache) == {"a", "c", "d"}
    touch(cache, "b")
    assert names(cache) == {"a", "b", "d"}


def test_what_is_in_use_stays_beyond_the_limit_and_no_longer(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, SIZE)
    with ExitStack() as stack:
        held = [stack.enter_context(cache.hold(digest, make)) for digest in ("a", "b", "c")]
        # Twice by the same process is once more.
        with cache.hold("a", make):
            pass
        touch(cache, "d")
        assert all((folder / "data").is_file() for folder in held)
        assert names(cache) == {"a", "b", "c"}
    assert len(names(cache)) == 1
    touch(cache, "e")
    assert names(cache) == {"e"}


def test_a_process_that_holds_keeps_and_one_that_was_killed_does_not(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, 0)
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold() -> None:
        with cache.hold("a", make):
            held.set()
            time.sleep(600)

    other = context.Process(target=hold)
    other.start()
    assert held.wait(60)
    touch(cache, "b")
    assert names(cache) == {"a"}
    other.kill()
    other.join()
    touch(cache, "c")
    assert names(cache) == set()


def test_of_many_that_want_it_one_makes_it(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, SIZE)
    made = []

    def slowly(path: Path) -> None:
        with atomic_folder(path) as temporary:
            time.sleep(0.1)
            (temporary / "data").write_bytes(b"x" * SIZE)
            made.append(path)

    def use(_: int) -> int:
        with cache.hold("a", slowly) as folder:
            return (folder / "data").stat().st_size

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(use, range(32))) == [SIZE] * 32
    assert len(made) == 1


def test_users_and_evictions_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, SIZE)

    def use(step: int) -> int:
        with cache.hold("abcd"[step % 4], make) as folder:
            return len((folder / "data").read_bytes())

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(use, range(400))) == [SIZE] * 400
    touch(cache, "e")
    assert names(cache) == {"e"}


def test_what_fails_leaves_nothing_and_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, 10 * SIZE)

    def fail(path: Path) -> None:
        with atomic_folder(path) as temporary:
            (temporary / "data").write_bytes(b"x")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"), cache.hold("a", fail):
        pass
    assert names(cache) == set()
    for name, age in ((".b.partial", 7200), (".c.partial", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "not ours").write_text("x")
    touch(cache, "d")
    assert names(cache) == {".c.partial", "d", "not ours"}


@pytest.mark.parametrize("digest", ["", "..", "../a", "A", "a/b"])
def test_a_digest_is_no_path(digest: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="digest: expected hexadecimal digits"),
        FolderCache(tmp_path, 1).hold(digest, make),
    ):
        pass
    with pytest.raises(ValueError, match="limit: expected a number of bytes, got -1"):
        FolderCache(tmp_path, -1)
