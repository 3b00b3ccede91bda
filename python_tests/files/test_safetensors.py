"""Safetensors files as the library has them, and headers that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraxs_ext.files.safetensors import Entry, entry, parse_header, read_header, write_shard

TENSORS = {
    "wide": torch.randn(3, 4, dtype=torch.float64),
    "half": torch.randn(5, 3).to(torch.bfloat16),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "scalar": torch.tensor(2),
    "flags": torch.tensor([True, False, True]),
}


def header(**changes: Any) -> bytes:
    """Of two tensors of 8 bytes each."""
    a = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    b = {"dtype": "F64", "shape": [], "data_offsets": [8, 16]}
    return json.dumps({"a": {**a, **changes}, "b": b}).encode()


def test_shards_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "wide": torch.randn(3, 4, dtype=torch.float64),
        "half": torch.randn(5, 3).to(torch.bfloat16).mT,
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(2.0),
    }
    entries = [entry(name, tensor.dtype, tensor.shape, lambda t=tensor: t) for name, tensor in tensors.items()]
    flags = torch.tensor([True, False, True])
    entries.append(Entry("flags", "BOOL", (3,), 3, lambda: flags))
    path = tmp_path / "x.safetensors"
    assert [one.name for one in write_shard(path, entries, {"format": "pt"})] == [*tensors, "flags"]
    stored = load_file(path)
    assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
        name: (t.dtype, t.shape) for name, t in {**tensors, "flags": flags}.items()
    }
    assert all(torch.equal(stored[name], tensor) for name, tensor in {**tensors, "flags": flags}.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="short: expected 16 bytes, got 8"):
        list(write_shard(path, [entry("short", torch.float32, (4,), lambda: torch.zeros(2))], {}))


def test_files_of_the_library_are_read_bit_for_bit(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    with (tmp_path / "x").open("rb") as file:
        text, size = read_header(file)
        data = bytearray(file.read())
    metadata, places = parse_header(text, size)
    assert metadata == {"format": "pt"} and len(data) == size and places.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (places[name].dtype, places[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(places[name].read(data), tensor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "expected a whole safetensors file.*got list"),
        (b"[" * 100_000, "expected a whole safetensors file"),
        (b"\xff{}", "expected a whole safetensors file"),
        (b'{"a": 3}', "a: expected dtype, shape and place"),
        (b'{"__metadata__": {"a": 1}}', "a field of its header is not text"),
        (header(shape=[1 << 40]), r"a: expected \[1099511627776\] of torch.float32 in the file, got the bytes 0 to 8"),
        (header(shape=[1 << 47] * 100_000), "a: expected dtype, shape and place"),
        (header(shape=[-2]), "a: expected dtype, shape and place"),
        (header(shape=[2.0]), "a: expected dtype, shape and place"),
        (header(shape=[True, 2]), "a: expected dtype, shape and place"),
        (header(data_offsets=[0, 8, 16]), "a: expected dtype, shape and place"),
        (header(data_offsets=[8, 0]), "in the file, got the bytes 8 to 0"),
        (header(data_offsets=[8, 16]), "a hole or an overlap at byte 0"),
        (header(shape=[1], data_offsets=[0, 4]), "a hole or an overlap at byte 4"),
        (header(dtype="Q3"), "a: expected numbers of a known dtype, got 'Q3'"),
        (header(dtype=["F32"]), "a: expected numbers of a known dtype"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "of 8 bytes behind its header, got 16"),
    ],
)
def test_a_header_that_lies_is_refused(text: bytes, message: str) -> None:
    assert list(parse_header(header(), 16).places) == ["a", "b"]
    with pytest.raises(ValueError, match=message):
        parse_header(text, 16)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\0" * 20, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_a_length_that_lies_is_refused_before_anything_is_allocated(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file, pytest.raises(ValueError, match="that claim a header of"):
        read_header(file)
