"""Folders that appear whole or not at all, whatever happens to who writes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraxs_ext.files import atomic, atomic_folder

ROOT = Path(__file__).parents[2]

# A child dies by SIGKILL at every line on the way, those that remove files included; all are forked before torch has
# started any thread. What is left is one folder or the other, and the next writer cleans up.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from loraxs_ext.files import atomic, atomic_folder
place, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
NAMES = ("adapter_config.json", "b", "c/d")
os.fsync = lambda descriptor: None
if not exchange:
    atomic._exchange = lambda one, other: False

def write(text):
    with atomic_folder(place / "out", overwrite=True) as folder:
        (folder / "c").mkdir()
        for name in NAMES:
            (folder / name).write_text(text)

def text_of(folder):
    texts = {(folder / name).read_text() for name in NAMES}
    assert len(texts) == 1, texts
    return texts.pop()

def dying(line):
    left = [line]
    def trace(frame, event, argument):
        if frame.f_code.co_filename not in (atomic.__file__, shutil.__file__):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

write("old")
found, line = [], 0
while True:
    child = os.fork()
    if child == 0:
        sys.settrace(dying(line))
        write("new")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    if exchange or (place / "out").exists():
        found.append(text_of(place / "out"))
    else:
        assert text_of(place / ".out.replaced") == "old"
    write("old")
    assert os.listdir(place) == ["out"] and text_of(place / "out") == "old", os.listdir(place)
    line += 1
assert found[0] == "old" and found[-1] == "new" and found == sorted(found, reverse=True), found
print(line, found.count("old"), found.count("new"))
"""


@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_killed_at_any_line_there_is_the_old_folder_or_the_new(how: str, tmp_path: Path) -> None:
    if how == "exchange" and not exchanges(tmp_path):
        pytest.skip("this file system cannot exchange two names")
    command = [sys.executable, "-c", KILLED, str(tmp_path), how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines, old, new = map(int, done.stdout.split())
    assert lines > 50 and old > 20 and new > 10


def exchanges(folder: Path) -> bool:
    one, other = folder / "one", folder / "other"
    for path in (one, other):
        path.mkdir()
    try:
        return atomic._exchange(one, other)
    finally:
        one.rmdir()
        other.rmdir()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "config.json").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "config.json").read_text() == "1"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_what_is_there_is_replaced_only_on_request(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    for text in ("1", "2"):
        with atomic_folder(out, overwrite=True) as folder:
            (folder / "config.json").write_text(text)
    assert (out / "config.json").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="out exists"), atomic_folder(out):
        raise AssertionError("not reached")
    with pytest.raises(RuntimeError), atomic_folder(out, overwrite=True):
        raise RuntimeError
    assert (out / "config.json").read_text() == "2"


def test_only_models_and_adapters_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "parent" / "deep" / "child").mkdir(parents=True)
    for name in ("parent", "parent/deep/child"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="holds the adapter deep/child"):
        with atomic_folder(tmp_path / "parent", overwrite=True):
            raise AssertionError("not reached")
    for name in ("home", "file", "link"):
        with pytest.raises(FileExistsError, match="is not overwritten"), atomic_folder(tmp_path / name, overwrite=True):
            raise AssertionError("not reached")
    assert sorted(tmp_path.rglob("*")) == before


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("mine")
        with pytest.raises(BlockingIOError, match="another process is writing"), atomic_folder(tmp_path / "out"):
            raise AssertionError("not reached")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


def test_many_writers_of_one_folder_and_one_makes_it(tmp_path: Path) -> None:
    made: list[Path] = []

    def write(step: int) -> None:
        target = tmp_path / str(step // 8)
        try:
            with atomic_folder(target) as folder:
                (folder / "config.json").write_text("1")
                made.append(target)
        except BlockingIOError:
            pass
        except FileExistsError:
            assert (target / "config.json").read_text() == "1"

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8 * 200)))
    assert sorted(made) == sorted(tmp_path / str(number) for number in range(200))
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(200)}


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the two of a file system that cannot exchange names."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    real, done = os.rename, []

    def failing(source: Path, target: Path) -> None:
        done.append(source.name)
        if source.name == ".out.partial":
            raise OSError("full")
        real(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert done == ["out", ".out.partial", ".out.replaced"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    rename = os.rename
    monkeypatch.setattr("os.fsync", lambda descriptor: steps.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr("os.rename", lambda *paths: (steps.append("rename"), rename(*paths)))
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            (folder / name).write_text("1")
    assert steps[-2:] == ["rename", str(tmp_path)]
    assert sorted(steps[:-2]) == sorted(map(str, (folder, folder / "a", folder / "inner", folder / "inner" / "b")))


def test_a_process_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("1")
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "config.json").write_text("2")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / "out" / "config.json").read_text() == "2"


def test_many_writers_replace_one_folder(tmp_path: Path) -> None:
    def write(step: int) -> int:
        try:
            with atomic_folder(tmp_path / "out", overwrite=True) as folder:
                for name in ("config.json", "b"):
                    (folder / name).write_text(str(step))
        except BlockingIOError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(write, range(400))) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "b").read_text() == (tmp_path / "out" / "config.json").read_text()
