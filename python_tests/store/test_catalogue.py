"""What a store promises within one process: contents, versions, names, refusals."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraxs_ext.store import AdapterRow, AdapterStore, RowLayout, Segment, VersionConflict, in_dtype

from . import stores

pytest.importorskip("lmdb")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with stores.create(tmp_path / "store") as made:
        yield made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_what_was_put_comes_back_bit_for_bit_also_after_closing(tmp_path: Path, dtype: torch.dtype) -> None:
    put = stores.row("alice", seed=3, dtype=dtype)
    with stores.create(tmp_path / "store") as store:
        assert store.put(put) == 1
        assert stores.same(store.row("alice"), put)
    with AdapterStore(tmp_path / "store") as store:
        found = store.row("alice")
        assert (found.name, found.version) == ("alice", 1)
        assert stores.same(found, put)


def test_rows_of_a_batch_may_be_of_other_dtypes_ranks_and_modules(store: AdapterStore) -> None:
    part = RowLayout([Segment(stores.KEYS[1], 2, -0.5)])
    rows = [
        stores.row("a", 1),
        stores.row("b", 2, rank=2, dtype=torch.int8),
        AdapterRow("c", 0, part, torch.tensor([1.0, -0.0, 3.0, 1e-40])),
        AdapterRow("d", 0, RowLayout([]), torch.empty(0)),
    ]
    assert store.put_many(rows) == [1, 1, 1, 1]
    assert all(stores.same(store.row(row.name), row) for row in rows)
    assert len(store) == 4
    assert store.put_many([]) == []


def test_the_row_is_a_copy(store: AdapterStore) -> None:
    store.put(stores.row("alice", 1))
    found = store.row("alice")
    found.numbers.zero_()
    store.put(stores.row("alice", 2))
    assert (found.numbers == 0).all()
    assert stores.same(store.row("alice"), stores.row("alice", 2))


def test_non_contiguous_numbers_and_such_with_gradients_are_stored(store: AdapterStore) -> None:
    numbers = torch.randn(2 * stores.layout().size, requires_grad=True)[::2]
    store.put(AdapterRow("alice", 0, stores.layout(), numbers))
    assert torch.equal(store.row("alice").numbers, numbers)


def test_versions_count_up_through_replacement_deletion_and_return(store: AdapterStore) -> None:
    assert [store.put(stores.row("alice", seed)) for seed in range(3)] == [1, 2, 3]
    assert store.version("alice") == 3
    store.delete("alice")
    assert "alice" not in store
    with pytest.raises(KeyError, match="no adapter 'alice'"):
        store.version("alice")
    # A pager that still holds version 3 must not take this one for it.
    assert store.put(stores.row("alice")) == 4
    store.delete("alice")
    assert store.put_many([stores.row("alice"), stores.row("alice")]) == [5, 6]


def test_versions_of_several_adapters_at_once(store: AdapterStore) -> None:
    store.put_many([stores.row(name) for name in ("alice", "bob", "alice")])
    assert store.current_versions(["bob", "alice", "bob"]) == [1, 2, 1]
    assert store.current_versions([]) == []
    with pytest.raises(KeyError, match="no adapter 'carol'"):
        store.current_versions(["alice", "carol"])


def test_only_the_current_version_is_kept_by_default(store: AdapterStore) -> None:
    store.put(stores.row("alice", 1))
    store.put(stores.row("alice", 2))
    assert store.versions("alice") == [2]
    assert stores.same(store.row("alice", 2), stores.row("alice", 2))
    for version in (0, 1, 3, -1, 1 << 70):
        with pytest.raises(KeyError, match=f"'alice' of version {version}"):
            store.row("alice", version)


def test_older_versions_are_kept_rolled_back_and_deleted(tmp_path: Path) -> None:
    with stores.create(tmp_path / "store", keep=3, sync=False) as store:
        # A name that begins with another one and a later byte must not get into its history.
        store.put_many([stores.row("alice2", seed) for seed in range(3)])
        for seed in range(300):
            store.put(stores.row("alice", seed))
        assert store.versions("alice") == [298, 299, 300]
        assert stores.same(store.row("alice", 298), stores.row("alice", 297))
        assert store.row("alice", 298).version == 298
        assert store.rollback("alice", 298) == 301
        assert stores.same(store.row("alice"), stores.row("alice", 297))
        with pytest.raises(KeyError):
            store.rollback("alice", 298)
        store.delete("alice")
        assert store.put(stores.row("alice")) == 302
        assert store.versions("alice") == [302]
        assert store.versions("alice2") == [1, 2, 3]
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        stores.create(tmp_path / "other", keep=0)


def test_compare_and_set(store: AdapterStore) -> None:
    assert store.put(stores.row("alice", 1), expected_version=0) == 1
    with pytest.raises(VersionConflict, match="'alice': expected version 0, got 1"):
        store.put(stores.row("alice", 2), expected_version=0)
    with pytest.raises(VersionConflict, match="expected version 2, got 1"):
        store.delete("alice", expected_version=2)
    assert stores.same(store.row("alice"), stores.row("alice", 1))
    assert store.put(stores.row("alice", 3), expected_version=1) == 2
    store.delete("alice", expected_version=2)
    assert store.put(stores.row("alice", 4), expected_version=0) == 3


def test_of_many_threads_that_compare_and_set_one_wins_each_round(store: AdapterStore) -> None:
    won = []

    def race() -> None:
        for expected in range(20):
            try:
                won.append(store.put(stores.row("alice"), expected_version=expected))
            except VersionConflict:
                pass

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(set(won))
    assert store.version("alice") == len(won)


def test_a_batch_is_all_or_nothing(store: AdapterStore) -> None:
    store.put(stores.row("a", 1))
    bad = AdapterRow("c", 0, stores.layout(), torch.full((stores.layout().size,), torch.nan))
    with pytest.raises(ValueError, match="adapter 'c': numbers: expected finite"):
        store.put_many([stores.row("a", 2), stores.row("b"), bad])
    assert list(store) == ["a"] and store.version("a") == 1


NAMES = ["a", "a/b", "a/../b", "..", "/etc/passwd", "ä", "名前", "a b", "🎈", "z" * 500, "C:\\x"]


def test_names_are_keys_and_never_paths(store: AdapterStore, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    store.put_many([stores.row(name, i) for i, name in enumerate(NAMES)])
    assert list(store.names()) == sorted(NAMES, key=str.encode)
    for i, name in enumerate(NAMES):
        assert stores.same(store.row(name), stores.row(name, i))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["", "z" * 501, "ä" * 251, "a\0b", "a\nb", "\x7f", "\x85", "\ud800"], ids=ascii)
def test_bad_names_are_refused_everywhere(store: AdapterStore, name: str) -> None:
    for call in (store.version, store.row, store.delete, store.versions, store.__contains__):
        with pytest.raises(ValueError, match="name: expected"):
            call(name)
    with pytest.raises(ValueError, match="name: expected"):
        store.put(stores.row(name))
    with pytest.raises(TypeError, match="name: expected a string, got 3"):
        store.row(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [1, 3, 1024])
def test_names_by_prefix_and_in_pages(store: AdapterStore, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraxs_ext.store.catalogue._PAGE", page)
    names = ["a", "a/1", "a/2", "a/3", "b", "b/1"]
    store.put_many([stores.row(name) for name in names])
    assert list(store.names()) == names
    assert list(store.names("a/")) == ["a/1", "a/2", "a/3"]
    assert list(store.names("a", limit=2)) == ["a", "a/1"]
    assert list(store.names("a", after="a/1")) == ["a/2", "a/3"]
    assert list(store.names("a/", after="a")) == ["a/1", "a/2", "a/3"]
    assert list(store.names("a/", after="a/2x")) == ["a/3"]
    assert list(store.names("a/", after="b")) == []
    assert list(store.names("c")) == list(store.names(limit=0)) == list(store.names(after="b/1")) == []


def test_a_name_deleted_while_names_are_read_does_not_stop_them(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraxs_ext.store.catalogue._PAGE", 1)
    store.put_many([stores.row(name) for name in "abcd"])
    seen = []
    for name in store.names():
        seen.append(name)
        store.delete(name)
    assert seen == list("abcd") and len(store) == 0


def test_a_rank_or_module_that_the_basis_lacks_is_refused_with_numbers(store: AdapterStore) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'alice': model.layers.0.q_proj: expected a rank of at most 4, got 5"):
            store.put(stores.row("alice", rank=5))
    strange = RowLayout([Segment(stores.KEYS[0], 1), Segment("lm_head", 1)])
    with pytest.raises(ValueError, match="its basis, which has 3, got 1 of 2 that it does not know.*'lm_head'"):
        store.put(AdapterRow("alice", 0, strange, torch.zeros(2)))
    assert len(store) == 0


def test_a_store_for_another_base_is_refused(tmp_path: Path) -> None:
    stores.create(tmp_path / "store").close()
    AdapterStore(tmp_path / "store", basis="0123456789abcdef").close()
    with pytest.raises(ValueError, match="expected adapters of the base feed, got those of 0123456789abcdef"):
        AdapterStore(tmp_path / "store", basis="feed")
    AdapterStore.create(tmp_path / "unknown", stores.manifest(fingerprint="")).close()
    with pytest.raises(ValueError, match="expected adapters of the base feed, got those of an unknown one"):
        AdapterStore(tmp_path / "unknown", basis="feed")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (AdapterRow("a", 0, stores.layout(), torch.zeros(47)), r"numbers: expected \[48\], got \[47\]"),
        (AdapterRow("a", 0, stores.layout(), torch.zeros(48, dtype=torch.float64)), "expected fp32, .* got .*float64"),
        (AdapterRow("a", 0, stores.layout(), torch.zeros(48, dtype=torch.int8)), "steps: expected with int8"),
        (AdapterRow("a", 0, stores.layout(), torch.zeros(48), torch.ones(3)), "steps: expected with int8"),
        (
            AdapterRow("a", 0, stores.layout(), torch.zeros(48, dtype=torch.int8), torch.ones(2)),
            r"steps: expected torch.float32 \[3\], got torch.float32 \[2\]",
        ),
        (
            AdapterRow("a", 0, stores.layout(), torch.zeros(48, dtype=torch.int8), torch.full((3,), torch.inf)),
            "steps: expected finite",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(store: AdapterStore, row: AdapterRow, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"adapter 'a': .*{message}|adapter 'a': {message}"):
        store.put(row)
    assert "a" not in store


def test_create_refuses_what_exists_and_leaves_nothing_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.create(tmp_path / "store").close()
    with pytest.raises(FileExistsError):
        stores.create(tmp_path / "store")
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        stores.create(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_opening_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an adapter store"):
        AdapterStore(tmp_path)
    (tmp_path / "data.mdb").write_bytes(b"x" * 10000)
    with pytest.raises(ValueError, match="expected an adapter store, got"):
        AdapterStore(tmp_path)


def test_in_dtype_refuses_what_would_overflow() -> None:
    big = AdapterRow("a", 0, RowLayout([Segment("m", 1)]), torch.tensor([1e5]))
    with pytest.raises(ValueError, match="expected a range that torch.float16 has"):
        in_dtype(big, torch.float16)
