"""Safetensors files that are believed only if sizes and checksums agree, and that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

# The header of a model with 1,000 matrices takes about 1 MiB.
_HEADER_LIMIT = 1 << 25
_DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
_CHECKSUMS = "checksums"


class Layout(NamedTuple):
    """dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """A safetensors file, open for reading. Tensors are read, and their checksums verified, one by one.

    What is read comes from the file that was opened, whatever replaces it under its name in the meantime.

    Attributes:
        metadata: the text fields of the header.
        layout: dtype and shape of every tensor; they fit the size of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a whole safetensors file, or not one of `write_tensors`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            size = os.fstat(self._file.fileno()).st_size
            self._start, header = _read_header(self._file, size)
            self.metadata = _text_fields(header.pop("__metadata__", {}))
            self._checksums = _text_fields(_parse(self.metadata.pop(_CHECKSUMS, ""), "its checksums"))
            self._begin: dict[str, int] = {}
            self.layout: dict[str, Layout] = {}
            self._check_layout(header, size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU.

        Raises:
            ValueError: its checksum differs.
        """
        layout = self.layout[name]
        data = bytearray(layout.dtype.itemsize * math.prod(layout.shape))
        self._file.seek(self._start + self._begin[name])
        if self._file.readinto(data) != len(data) or _checksum(data) != self._checksums.get(name):
            raise ValueError(f"the checksum of its tensor {name!r} does not agree")
        if not data:
            return torch.empty(layout.shape, dtype=layout.dtype)
        return torch.frombuffer(data, dtype=layout.dtype).view(layout.shape)

    def expect(self, metadata: Mapping[str, str], layout: Mapping[str, Layout] | None = None) -> None:
        """Raise ValueError unless the file has these text fields, and exactly these tensors."""
        for field, expected in metadata.items():
            if self.metadata.get(field) != expected:
                raise ValueError(f"its {field} is {self.metadata.get(field)!r}, expected {expected!r}")
        if layout is not None and self.layout != dict(layout):
            wrong = sorted(name for name in {*layout, *self.layout} if layout.get(name) != self.layout.get(name))[0]
            raise ValueError(f"its tensor {wrong!r} is {self.layout.get(wrong)}, expected {layout.get(wrong)}")

    def _check_layout(self, header: Mapping[str, object], size: int) -> None:
        """Types and shapes must account for every byte of the file, before a single one is read."""
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
            dtype, shape = _dtype_and_shape(entry)
            begin, stop = _offsets(entry)
            if begin != end or stop - begin != dtype.itemsize * math.prod(shape):
                raise ValueError(f"its tensor {name!r} of shape {shape} does not fit the bytes {begin} to {stop}")
            self.layout[name], self._begin[name], end = Layout(dtype, shape), begin, stop
        if self._start + end != size:
            raise ValueError(f"it has {size} bytes, its header accounts for {self._start + end}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file for `TensorFile`; it appears under its name complete and synced.

    Args:
        path: its folder must exist.
        tensors: fp32, fp64 or int64.
        metadata: text fields.
    """
    # The widest first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    data = {name: _bytes_of(tensor) for name, tensor in ordered}
    sums = json.dumps({name: _checksum(part) for name, part in data.items()})
    header: dict[str, object] = {"__metadata__": {**metadata, _CHECKSUMS: sums}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + data[name].nbytes
        kind = next(kind for kind, dtype in _DTYPES.items() if dtype == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in data.values():
            file.write(part)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; synced and renamed to `path` on success, removed on failure."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_header(file: BinaryIO, size: int) -> tuple[int, dict[str, object]]:
    """Where the data begins, and the parsed header: JSON behind its length as a little-endian 64-bit number."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
        raise ValueError(f"its header claims {length} bytes")
    return 8 + length, _parse(file.read(length), "its header")


def _parse(text: bytes | str, what: str) -> dict[str, object]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"{what} is not a JSON object")
    return parsed


def _text_fields(fields: object) -> dict[str, str]:
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise ValueError("a field of its header is not text")
    return fields


def _whole_numbers(values: object) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"its header gives {values!r} for a list of sizes")
    return values


def _dtype_and_shape(entry: object) -> tuple[torch.dtype, tuple[int, ...]]:
    if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES:
        raise ValueError(f"its header describes a tensor as {entry!r}")
    return _DTYPES[entry["dtype"]], tuple(_whole_numbers(entry.get("shape")))


def _offsets(entry: object) -> tuple[int, int]:
    offsets = _whole_numbers(entry.get("data_offsets") if isinstance(entry, dict) else None)
    if len(offsets) != 2:
        raise ValueError(f"its header gives {offsets} for the place of a tensor")
    return offsets[0], offsets[1]


def _bytes_of(tensor: Tensor) -> memoryview:
    plain: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(plain)


def _checksum(data: bytearray | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
