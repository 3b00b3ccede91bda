"""Fetching: only complete folders are trusted, and an archive is not believed."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.demo import fetch
from examples.demo.fetch import FetchError, Package


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def sdist(inner: dict[str, bytes | str]) -> bytes:
    """A tar.gz with a tar.gz inside; a str value is a link to that target."""

    def pack(files: dict[str, bytes | str]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                if isinstance(data, str):
                    member.type, member.linkname = tarfile.SYMTYPE, data
                    archive.addfile(member)
                else:
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return buffer.getvalue()

    return pack({"outer/data.tar.gz": pack(inner)})


def package(source: bool, files: dict[str, int]) -> Package:
    root = "outer/data.tar.gz!inner" if source else "inner"
    return Package("a-package", "1.0", "0" * 64, source, root, files)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[int]]:
    """Make pip's download give these bytes; the returned list has one entry a download."""

    def serve(data: bytes) -> list[int]:
        calls: list[int] = []

        def download(package: Package, folder: Path) -> Path:
            calls.append(len(calls))
            (folder / "archive").write_bytes(data)
            return folder / "archive"

        monkeypatch.setattr(fetch, "_download", download)
        return calls

    return serve


@pytest.mark.parametrize("source", [False, True], ids=["wheel", "sdist"])
def test_keeps_the_wanted_files_and_downloads_once(tmp_path: Path, served: Callable, source: bool) -> None:
    files = {"inner/a.txt": b"12345", "inner/b.txt": b"1"}
    calls = served(sdist(files) if source else wheel(files))
    folder = fetch.fetch(package(source, {"a.txt": 5}), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    assert (folder / "a.txt").read_bytes() == b"12345"
    assert fetch.fetch(package(source, {"a.txt": 5}), tmp_path) == folder
    assert len(calls) == 1
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["a-package-1.0"]


def test_a_damaged_folder_is_fetched_again(tmp_path: Path, served: Callable) -> None:
    calls = served(wheel({"inner/a.txt": b"12345"}))
    folder = fetch.fetch(package(False, {"a.txt": 5}), tmp_path)
    (folder / "a.txt").write_bytes(b"123")
    assert (fetch.fetch(package(False, {"a.txt": 5}), tmp_path) / "a.txt").read_bytes() == b"12345"
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        (False, wheel({"inner/a.txt": b"123456"}), "other sizes"),
        (False, wheel({"inner/other": b"12345"}), "cannot be read"),
        (False, b"not an archive", "cannot be read"),
        (True, sdist({"inner/a.txt": "/etc/passwd"}), "not a regular file"),
        (True, sdist({"inner/a.txt": b"123456"}), "not a regular file of at most 5"),
        (True, sdist({"inner/../a.txt": b"12345"}), "cannot be read"),
        (True, b"not an archive", "cannot be read"),
    ],
    ids=["size", "missing", "no-zip", "link", "too-large", "other-path", "no-tar"],
)
def test_refuses_what_is_not_as_expected(
    tmp_path: Path, served: Callable, source: bool, data: bytes, message: str
) -> None:
    served(data)
    with pytest.raises(FetchError, match=message):
        fetch.fetch(package(source, {"a.txt": 5}), tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_pip_refuses_another_hash(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    data = wheel(
        {
            "a_package-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: a-package\nVersion: 1.0\n",
            "a_package-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "a_package-1.0.dist-info/RECORD": b"",
            "inner/a.txt": b"12345",
        }
    )
    (tmp_path / "index" / "a_package-1.0-py3-none-any.whl").write_bytes(data)
    right = Package("a-package", "1.0", hashlib.sha256(data).hexdigest(), False, "inner", {"a.txt": 5})
    wrong = Package("a-package", "1.0", hashlib.sha256(b"").hexdigest(), False, "inner", {"a.txt": 5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
        assert (fetch.fetch(right, tmp_path / "good") / "a.txt").read_bytes() == b"12345"
        with pytest.raises(FetchError, match="a-package==1.0"):
            fetch.fetch(wrong, tmp_path / "bad")


def test_cache_folder_follows_the_environment(
    tmp_path: Path, served: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path / "here"))
    served(wheel({"inner/a.txt": b"12345"}))
    assert fetch.fetch(package(False, {"a.txt": 5})) == tmp_path / "here" / "packages" / "a-package-1.0"
