"""The bytes of a record: what is written is read, and nothing else is."""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path

import pytest
import torch

from loraxs_ext.store import AdapterRow, AdapterStore, DamagedRecord, RowLayout, Segment
from loraxs_ext.store.record import HEADER_SIZE, decode, encode, version_of

from . import stores

BASIS = bytes(range(16))
LAYOUT = stores.layout()
LAYOUTS = {LAYOUT.digest: LAYOUT}
CURRENT = encode(stores.row("alice"), stores.manifest().digest).seal(2)


def record(dtype: torch.dtype = torch.float32, version: int = 3) -> bytes:
    return encode(stores.row("alice", dtype=dtype), BASIS).seal(version)


def read(data: bytes, name: str = "alice", basis: bytes = BASIS) -> AdapterRow:
    return decode(name, data, basis, LAYOUTS.get, "S")


def forged(**changes: int | bytes) -> bytes:
    """A record with other header fields, and a checksum that agrees with them."""
    from loraxs_ext.store import record as module

    data = record()
    names = ("magic", "format", "dtype", "reserved", "version", "layout", "basis", "size")
    fields = dict(zip(names, module._HEADER.unpack_from(data), strict=True))
    payload = bytes(changes.pop("payload", data[HEADER_SIZE:]))
    header = module._HEADER.pack(*{**fields, **changes}.values())
    checksum = module._checksum(module.zlib.crc32(payload), "alice", header)
    return header + struct.pack("<I", checksum) + payload


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_a_record_is_read_as_it_was_written(dtype: torch.dtype) -> None:
    data = record(dtype)
    row = read(data)
    assert stores.same(row, stores.row("alice", dtype=dtype)) and (row.name, row.version) == ("alice", 3)
    assert version_of(data) == 3
    steps = 4 * len(LAYOUT.segments) if dtype == torch.int8 else 0
    assert len(data) == HEADER_SIZE + steps + LAYOUT.size * dtype.itemsize
    # Aligned where it comes to lie in an 8-byte aligned buffer.
    assert HEADER_SIZE % 8 == 0


def test_extreme_numbers_keep_their_bits() -> None:
    layout = RowLayout([Segment("m", 3)])
    numbers = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1e-38, 1.0, -1.0])
    data = encode(AdapterRow("a", 0, layout, numbers), BASIS).seal(1)
    row = decode("a", data, BASIS, {layout.digest: layout}.get, "S")
    assert torch.equal(row.numbers.view(torch.int32), numbers.view(torch.int32))


def test_the_forger_forges() -> None:
    assert forged() == record()


def test_every_flipped_bit_is_seen() -> None:
    data = record(torch.float16)
    for position in range(8 * len(data)):
        broken = bytearray(data)
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises(DamagedRecord, match="store S: adapter 'alice': expected .*, got "):
            read(bytes(broken))


def test_every_truncation_and_any_extension_is_seen() -> None:
    data = record(torch.int8)
    for size in range(len(data)):
        with pytest.raises(DamagedRecord):
            read(data[:size])
    with pytest.raises(DamagedRecord):
        read(data + b"\0")
    with pytest.raises(DamagedRecord, match=f"expected a header of {HEADER_SIZE} bytes, got {HEADER_SIZE - 1}"):
        version_of(data[: HEADER_SIZE - 1])


def test_a_record_belongs_to_its_name_and_basis() -> None:
    with pytest.raises(DamagedRecord, match="adapter 'bob': expected the checksum"):
        read(record(), name="bob")
    other = bytes(16)
    with pytest.raises(DamagedRecord, match=f"expected a record of the basis {other.hex()}, got {BASIS.hex()}"):
        read(record(), basis=other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"LXSX"}, "expected a record b'LXSR' of format 1, got b'LXSX' of format 1"),
        ({"format": 2}, "of format 2"),
        ({"dtype": 4}, "expected a known dtype and a version, got dtype 4"),
        ({"version": 0}, "version 0"),
        ({"reserved": 1}, "reserved bits 0x1"),
        ({"layout": bytes(16)}, f"expected a layout that the store has, got {'00' * 16}"),
        ({"size": 47}, "expected 48 numbers in 192 bytes, got 47 in 192"),
        ({"size": 0xFFFFFFFF}, "got 4294967295 in 192"),
        ({"dtype": 1}, "expected 48 numbers in 96 bytes, got 48 in 192"),
        ({"dtype": 3}, "expected 48 numbers in 60 bytes, got 48 in 192"),
        ({"payload": b""}, "got 48 in 0"),
    ],
    ids=str,
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(
    changes: dict[str, int | bytes], message: str
) -> None:
    with pytest.raises(DamagedRecord, match=re.escape(message)):
        read(forged(**changes))


def test_random_bytes_are_refused() -> None:
    draw = random.Random(0)
    for _ in range(500):
        with pytest.raises(DamagedRecord):
            read(draw.randbytes(draw.randrange(400)))


def damage(path: Path, database: str, key: bytes, value: bytes | None) -> None:
    """Change an entry of a store behind its back."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), max_dbs=5, map_size=1 << 24) as env:
        db = env.open_db(database.encode())
        with env.begin(write=True, db=db) as txn:
            assert txn.delete(key) if value is None else txn.put(key, value)


def damaged(path: Path, database: str, key: bytes, value: bytes | None) -> tuple[list[str], AdapterStore]:
    """The problems of a store with one entry changed, and the store, open."""
    with stores.create(path, keep=3) as store:
        store.put_many([stores.row("alice", 1), stores.row("bob", 2), stores.row("alice", 3)])
        assert store.check() == []
    damage(path, database, key, value)
    store = AdapterStore(path)
    return store.check(), store


def flipped(path: Path) -> bytes:
    with stores.create(path) as store:
        data = bytearray(encode(stores.row("bob", 2), store.manifest.digest).seal(1))
    data[-1] ^= 1
    return bytes(data)


def test_a_damaged_record_is_reported_and_the_others_stay_readable(tmp_path: Path) -> None:
    problems, store = damaged(tmp_path / "s", "adapters", b"bob", flipped(tmp_path / "t"))
    with store:
        assert len(problems) == 1 and "adapter 'bob': expected the checksum" in problems[0]
        with pytest.raises(DamagedRecord, match=f"store {tmp_path}/s: adapter 'bob'"):
            store.row("bob")
        assert stores.same(store.row("alice"), stores.row("alice", 3))
        assert store.put(stores.row("bob", 4)) == 2
        assert stores.same(store.row("bob"), stores.row("bob", 4))


@pytest.mark.parametrize(
    ("database", "key", "value", "message"),
    [
        ("adapters", b"bob", b"short", "expected a header of 56 bytes, got 5"),
        ("adapters", b"\xff", b"short", "key b'.xff': .*utf-8"),
        ("retired", b"bob", bytes(8), "expected an adapter or a deleted one, got both"),
        ("history", b"alice\0" + bytes(7) + b"\2", b"short", "expected a header"),
        ("history", b"carol\0" + bytes(7) + b"\1", b"short", "expected a header"),
        ("history", b"alice\0" + bytes(7) + b"\2", CURRENT, "expected an older version than 2, got 2"),
        ("layouts", LAYOUT.digest, None, f"expected a layout that the store has, got {LAYOUT.digest.hex()}"),
        ("layouts", LAYOUT.digest, b'[["m",1,1.0]]', "expected the digest"),
        ("layouts", LAYOUT.digest, b"[" * 100000, "layout"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_check_finds(tmp_path: Path, database: str, key: bytes, value: bytes | None, message: str) -> None:
    problems, store = damaged(tmp_path / "s", database, key, value)
    store.close()
    assert any(re.search(message, problem) for problem in problems), problems


def test_a_row_of_another_layout_than_its_digest_says_is_not_read(tmp_path: Path) -> None:
    other = RowLayout([*LAYOUT.segments[:-1], LAYOUT.segments[-1]._replace(scaling=9.0)])
    _, store = damaged(tmp_path / "s", "layouts", LAYOUT.digest, other.to_json().encode())
    with store, pytest.raises(DamagedRecord, match=f"expected the layout {LAYOUT.digest.hex()}"):
        store.row("bob")


def test_the_check_counts_what_it_sees_and_what_is_kept(tmp_path: Path) -> None:
    with stores.create(tmp_path / "s", keep=3) as store:
        for seed in range(3):
            store.put_many([stores.row(f"user {i}", seed) for i in range(300)])
        seen: list[int] = []
        assert store.check(seen.append) == [] and sum(seen) == 300 and len(seen) > 1
    damage(tmp_path / "s", "about", b"keep", (2).to_bytes(8, "big"))
    with AdapterStore(tmp_path / "s") as store:
        problems = store.check()
        assert len(problems) == 300 and "expected at most 1 older versions, got 2" in problems[0]


def test_room_that_nothing_takes_is_free(tmp_path: Path) -> None:
    with stores.create(tmp_path / "s", sync=False) as store:
        store.put_many([stores.row(f"user {i}") for i in range(400)])
        full = store.stat()
        for i in range(400):
            store.delete(f"user {i}")
        store.put(stores.row("last"))
        left = store.stat()
    assert full.adapters == 400 and full.free_bytes < full.nbytes / 4
    assert full.bytes_per_adapter * 400 == pytest.approx(full.nbytes - full.free_bytes)
    assert left.adapters == 1 and left.nbytes / 2 < left.free_bytes < left.nbytes


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (b"manifest", None, "got an LMDB file without a manifest"),
        (b"manifest", b"{}", "manifest: expected format 1, got None"),
        (b"manifest", b"[" * 100000, "manifest: expected format 1"),
        (b"manifest", b'{"format":1,"fingerprint":3}', "manifest: fingerprint: expected a str, got 3"),
        (b"sketches", b"\xff" * 64, "manifest: sketches: expected safetensors"),
        (b"keep", b"1", "without a manifest"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, key: bytes, value: bytes | None, message: str) -> None:
    stores.create(tmp_path / "s").close()
    damage(tmp_path / "s", "about", key, value)
    with pytest.raises(ValueError, match=f"{tmp_path}/s: .*{message}"):
        AdapterStore(tmp_path / "s")
