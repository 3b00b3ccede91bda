"""The format of safetensors: headers that account for every byte, and files written tensor by tensor.

A file is the length of its header as a little-endian 64-bit number, the header in JSON, and the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from .json_objects import parse_object

# Names of dtypes in a header.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {
    **FLOATS,
    **{f"I{dtype.itemsize * 8}": dtype for dtype in (torch.int8, torch.int16, torch.int32, torch.int64)},
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The header of a model with 1,000 matrices takes about 1 MiB.
_HEADER_LIMIT = 1 << 25
_MAX_DIMENSIONS = 8


class Place(NamedTuple):
    """A stored tensor: dtype, shape, and the byte behind the header where it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """That it takes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self, data: bytearray) -> Tensor:
        """The tensor in `data`, the bytes behind the header, whose memory it shares."""
        count = math.prod(self.shape)
        # torch refuses to look at nothing.
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype, count=count, offset=self.begin).view(self.shape)


class Header(NamedTuple):
    """What a header says.

    Attributes:
        metadata: its text fields.
        places: of the tensors, by name, in the order of their bytes.
    """

    metadata: dict[str, str]
    places: dict[str, Place]


def read_header(file: BinaryIO) -> tuple[bytes, int]:
    """The text of a file's header, and how many bytes of data lie behind it, where the file is left.

    Raises:
        ValueError: the file is not one of safetensors.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
        raise ValueError(f"expected a whole safetensors file, got {size} bytes that claim a header of {length}")
    return file.read(length), size - 8 - length


def parse_header(text: bytes, size: int) -> Header:
    """What the text of a header says, if that accounts for every byte of the data; none of them is looked at.

    Args:
        text: of the header.
        size: bytes of data behind it.

    Raises:
        ValueError: the header is no such one.
    """
    entries = parse_object(text, "expected a whole safetensors file, got a damaged header")
    metadata = text_fields(entries.pop("__metadata__", {}))
    places = {name: _place(name, entry) for name, entry in entries.items()}
    places = dict(sorted(places.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    position = 0
    for place in places.values():
        if place.begin != position:
            raise ValueError(f"expected a whole safetensors file, got a hole or an overlap at byte {position}")
        position += place.nbytes
    if position != size:
        raise ValueError(f"expected a whole safetensors file of {position} bytes behind its header, got {size}")
    return Header(metadata, places)


def text_fields(fields: object) -> dict[str, str]:
    """The fields of a header's metadata; ValueError if one of them is not text."""
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise ValueError("a field of its header is not text")
    return fields


def _place(name: str, entry: object) -> Place:
    values = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = values.get("dtype"), _sizes(values.get("shape")), _sizes(values.get("data_offsets"))
    if shape is None or offsets is None or len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"{name}: expected dtype, shape and place of a tensor, got {entry!r:.100}")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise ValueError(f"{name}: expected numbers of a known dtype, got {kind!r:.100}")
    place = Place(dtype, tuple(shape), offsets[0])
    if place.nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"{name}: expected {shape} of {dtype} in the file, got the bytes {offsets[0]} to {offsets[1]}")
    return place


def _sizes(values: object) -> list[int] | None:
    # JSON has numbers that would take all day to multiply.
    whole = isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
    return cast(list[int], values) if whole else None


class Entry(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: in the file.
        dtype: as a header names it.
        shape: of the tensor.
        nbytes: it will take.
        make: returns it, when its turn has come; nothing keeps it afterwards.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], Tensor]


def entry(name: str, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], Tensor]) -> Entry:
    """The entry of a tensor of one of `DTYPES`."""
    return Entry(name, _NAMES[dtype], tuple(shape), dtype.itemsize * math.prod(shape), make)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in order."""
    plain: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(plain)


def write_shard(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> Iterator[Entry]:
    """Write a file, tensor by tensor, so that they never lie in memory as a whole.

    Args:
        path: of the file.
        entries: in the order of their bytes in the file.
        metadata: text fields of the header.

    Yields:
        Each entry once it is written.

    Raises:
        ValueError: a tensor is not what its entry says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for one in entries:
        header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [end, end + one.nbytes]}
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in entries:
            data = bytes_of(one.make())
            if data.nbytes != one.nbytes:
                raise ValueError(f"{one.name}: expected {one.nbytes} bytes, got {data.nbytes}")
            file.write(data)
            del data
            yield one
