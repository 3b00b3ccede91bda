"""`loraxs pack` and `loraxs store`: what they print, what they leave behind, how they fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from loraxs_ext.store import AdapterStore

from .checkpoint.folders import Folders, saved
from .checkpoint.test_packing import another, rewrite, tensors
from .command_line import run, told

pytest.importorskip("lmdb")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A base, and three adapters of it below `users`."""
    path = tmp_path_factory.mktemp("made")
    with saved(path) as folders:
        for name in ("users/alice", "users/bob", "users/team/carol"):
            another(folders, path / name)
        return folders


@pytest.fixture
def store(made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A store with these three."""
    assert run("pack", tmp_path / "store", made.base.parent / "users") == 0
    capsys.readouterr()
    return tmp_path / "store"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a failing command says on stderr."""
    capsys.readouterr()
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return next(line for line in printed.err.splitlines() if line.startswith(f"loraxs {arguments[0]}: "))


def test_pack_and_again(made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users, store = made.base.parent / "users", tmp_path / "store"
    assert run("pack", store, users, "--dry-run") == 0
    assert "3 would be added" in capsys.readouterr().out and not store.exists()
    assert told(capsys, "pack", store, users, "--prefix", "v1/", "--keep", 2) == {
        "store": str(store), "added": 3, "replaced": 0, "unchanged": 0, "refused": 0,
    }  # fmt: skip
    assert run("pack", store, users, "--prefix", "v1/") == 0
    assert "0 added, 0 replaced, 3 unchanged, 0 refused" in capsys.readouterr().out
    assert told(capsys, "pack", store, users, "--prefix", "v1/", "--dtype", "int8", "--dry-run")["replaced"] == 3
    assert told(capsys, "pack", store, users, "--prefix", "v1/", "--dtype", "int8")["replaced"] == 3
    with AdapterStore(store) as opened:
        assert list(opened) == ["v1/alice", "v1/bob", "v1/team/carol"] and opened.keep == 2
        assert opened.versions("v1/bob") == [1, 2] and opened.row("v1/bob").numbers.dtype == torch.int8


def test_pack_reports_what_it_refuses(made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users, store = tmp_path / "users", tmp_path / "store"
    shutil.copytree(made.base.parent / "users", users)
    rewrite(made.adapter, users / "bad", bias="all")
    assert "refused: " in refused(capsys, "pack", store, users, "--strict")
    assert "'bad' was refused: " in refused(capsys, "pack", store, users)
    assert "3 added" in _printed(capsys, "pack", tmp_path / "again", users, status=1)
    with AdapterStore(store) as opened:
        assert list(opened) == ["alice", "bob", "team/carol"]


def _printed(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    capsys.readouterr()
    assert run(*arguments) == status
    return capsys.readouterr().out


def test_pack_makes_a_store_like_an_adapter(made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = another(made, tmp_path / "large", r=6)
    users = made.base.parent / "users"
    assert run("pack", tmp_path / "store", users, "--like", large) == 0
    assert told(capsys, "store", "info", tmp_path / "store")["ranks"] == {"6": 6}
    for option, value in (("--like", large), ("--keep", 2)):
        assert f"{option}: expected for a new store only" in refused(
            capsys, "pack", tmp_path / "store", users, option, value
        )
    assert run("pack", tmp_path / "store", large) == 0
    assert run("pack", tmp_path / "small", users) == 0
    assert "expected a rank of at most 4, the store's, got 6" in refused(capsys, "pack", tmp_path / "small", large)


def test_pack_wants_adapters_and_a_store(made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "got none" in refused(capsys, "pack", tmp_path / "store", made.base)
    assert "expected a folder" in refused(capsys, "pack", tmp_path / "store", tmp_path / "nowhere")
    assert "--jobs: expected at least 1" in refused(capsys, "pack", tmp_path / "store", made.base, "--jobs", 0)
    assert "expected an adapter store" in refused(capsys, "pack", made.base, made.adapter)
    assert "keep: expected at least 1 version" in refused(capsys, "pack", tmp_path / "store", made.adapter, "--keep", 0)
    bad = rewrite(made.adapter, tmp_path / "bad", use_edora=True)
    assert "nothing but R" in refused(capsys, "pack", tmp_path / "store", bad)
    assert not (tmp_path / "store").exists()


def test_list(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _printed(capsys, "store", "list", store) == "alice\nbob\nteam/carol\n"
    assert _printed(capsys, "store", "list", store, "--prefix", "team/") == "team/carol\n"
    assert told(capsys, "store", "list", store, "--after", "alice", "--limit", 1) == ["bob"]
    assert "--limit: expected 0 or more, got -1" in refused(capsys, "store", "list", store, "--limit", -1)
    assert "prefix: expected text that UTF-8 can hold" in refused(capsys, "store", "list", store, "--prefix", "\udcff")
    assert _printed(capsys, "store", "list", store, "--no-lock") == "alice\nbob\nteam/carol\n"
    assert "no data.mdb there" in refused(capsys, "store", "list", store / "x")


def test_info(made: Folders, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = told(capsys, "store", "info", store)
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    assert (facts["adapters"], facts["modules"], facts["ranks"], facts["keep"]) == (3, 6, {"4": 6}, 1)
    assert facts["base"] == str(made.base) and facts["base_fingerprint"] == config["base_fingerprint"]
    assert facts["recipe"]["sigma"] == "A" and facts["readers"] == 0
    assert 0 < facts["bytes_per_adapter"] <= facts["nbytes"] == (store / "data.mdb").stat().st_size
    printed = _printed(capsys, "store", "info", store)
    assert "3 adapters, 0 older versions, 1 layouts" in printed and "6 of rank 4" in printed


def test_check(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "3 adapters, 0 problems" in _printed(capsys, "store", "check", store)
    data = store / "data.mdb"
    with AdapterStore(store) as opened:
        needle = opened.row("bob").numbers.numpy().tobytes()
    # Everywhere, for a page that is free now may hold a copy.
    whole = data.read_bytes()
    assert needle in whole
    data.write_bytes(whole.replace(needle, bytes([needle[0] ^ 1]) + needle[1:]))
    assert "adapter 'bob': expected the checksum" in refused(capsys, "store", "check", store)
    assert "adapter 'bob': expected the checksum" in refused(capsys, "store", "export", store, store.parent / "out")


def test_compact_and_delete(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no adapter 'nobody'" in refused(capsys, "store", "delete", store, "alice", "nobody")
    assert "2 deleted, 1 left" in _printed(capsys, "store", "delete", store, "alice", "team/carol")
    assert " MB instead of " in _printed(capsys, "store", "compact", store, tmp_path / "small")
    assert _printed(capsys, "store", "list", tmp_path / "small") == "bob\n"
    assert "exists" in refused(capsys, "store", "compact", store, tmp_path / "small")


def test_export(made: Folders, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "3 exported" in _printed(capsys, "store", "export", store, out)
    for name in ("alice", "bob", "team/carol"):
        before, after = tensors(made.base.parent / "users" / name), tensors(out / name)
        assert all(torch.equal(after[key], before[key]) for key in before)
    assert made.logits(made.adapted(out / "bob")).equal(made.logits(made.adapted(made.base.parent / "users" / "bob")))
    assert "'bob' was not exported: " in refused(capsys, "store", "export", store, out, "bob")
    assert "1 exported" in _printed(capsys, "store", "export", store, out, "bob", "--overwrite")
    assert "1 exported" in _printed(capsys, "store", "export", store, tmp_path / "team", "--prefix", "team/")
    assert "there is no adapter 'nobody'" in refused(capsys, "store", "export", store, out, "nobody")


def test_export_does_not_leave_its_folder(
    made: Folders, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = ["../x", "/x", "a/../../x", "a//x", ".", "..", "c:x", "a\\x", "x" * 300]
    with AdapterStore(store) as opened:
        row = opened.row("bob")
        for name in ("alice", "bob", "team/carol"):
            opened.delete(name)
        opened.put_many([row._replace(name=name) for name in hostile])
    (tmp_path / "in").mkdir()
    before = sorted(tmp_path.iterdir())
    message = refused(capsys, "store", "export", store, tmp_path / "in" / "out")
    assert "was not exported: expected a plain relative path" in message
    assert sorted(tmp_path.iterdir()) == before and list((tmp_path / "in").iterdir()) == []


def test_an_action_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("store")
    assert exit.value.code == 2
