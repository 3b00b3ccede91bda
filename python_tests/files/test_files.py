"""Files that appear whole or not at all, and JSON that is believed only if it is an object."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from loraxs_ext.files import atomic_file, read_json, write_json


def test_a_file_appears_whole_with_the_rights_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "x") as temporary:
            temporary.write_text("new")
            assert (tmp_path / "x").read_text() == "old"
    finally:
        os.umask(before)
    assert (tmp_path / "x").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["x"]
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    replace = os.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: steps.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr("os.replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    with atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("1")
    assert steps == [str(temporary), "replace", str(tmp_path)]


def test_json_comes_back(tmp_path: Path) -> None:
    values = {"b": [1, None, "é"], "a": {"x": 1.5}}
    write_json(tmp_path / "x.json", values)
    assert read_json(tmp_path / "x.json") == values
    assert (tmp_path / "x.json").read_text(encoding="utf-8").endswith("  }\n}\n")


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b"[" * 100_000, b"\xff{}"])
def test_anything_else_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"x\.json: expected a JSON object"):
        read_json(tmp_path / "x.json")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{" + " " * 98 + "}")
    assert read_json(tmp_path / "x.json", limit=100) == {}
    (tmp_path / "x.json").write_text("{" + " " * 99 + "}")
    with pytest.raises(ValueError, match="of at most 100 bytes, got more"):
        read_json(tmp_path / "x.json", limit=100)
