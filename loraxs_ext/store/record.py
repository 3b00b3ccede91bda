"""The bytes of one adapter: a header, the steps of int8 numbers, then all R end to end.

Little-endian. The header says which format, version, dtype, layout and basis, and how many numbers; its checksum covers
the name too, so a record under another name is a damaged one. The checksum is zlib's CRC-32: it finds every burst of up
to 32 flipped bits, takes microseconds a record, and comes with Python. It is meant against accidents, not forgery.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import RowLayout
from .row import AdapterRow

MAGIC, FORMAT = b"LXSR", 1
# magic, format, dtype, reserved, version, layout digest, basis digest, how many numbers; the checksum follows. Together
# a multiple of 8 bytes, so that what comes next is aligned.
_HEADER = struct.Struct("<4sBBHQ16s16sI")
_CHECKSUM = struct.Struct("<I")
HEADER_SIZE = _HEADER.size + _CHECKSUM.size
_DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16, 3: torch.int8}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
DTYPES = tuple(_CODES)


class DamagedRecord(ValueError):
    """The bytes of a record are not those that were written, or belong to another store."""


class Draft(NamedTuple):
    """A record that only lacks its version.

    Attributes:
        name: of the adapter.
        dtype: code of the dtype of its numbers.
        layout, basis: digests.
        size: how many numbers.
        payload: steps and numbers.
        checksum: of the payload, so that the version may be chosen late and cheaply.
    """

    name: str
    dtype: int
    layout: bytes
    basis: bytes
    size: int
    payload: bytes
    checksum: int

    def seal(self, version: int) -> bytes:
        """The record, of a version from 1 on."""
        header = _HEADER.pack(MAGIC, FORMAT, self.dtype, 0, version, self.layout, self.basis, self.size)
        return b"".join((header, _CHECKSUM.pack(_checksum(self.checksum, self.name, header)), self.payload))


def encode(row: AdapterRow, basis: bytes) -> Draft:
    """The record of a row.

    Args:
        row: numbers [layout.size] in fp32, fp16, bf16, or int8 with steps; `row.version` is not read.
        basis: 16 bytes, digest of the manifest.

    Raises:
        ValueError or TypeError: the numbers don't fit the layout, or are not finite.
    """
    check_row(row)
    payload = _bytes_of(row.numbers)
    if row.steps is not None:
        payload = _bytes_of(row.steps) + payload
    code = _CODES[row.numbers.dtype]
    return Draft(row.name, code, row.layout.digest, basis, row.layout.size, payload, zlib.crc32(payload))


def check_row(row: AdapterRow) -> None:
    """Raise unless numbers and steps are what the layout says, and finite."""
    where = f"adapter {row.name!r}"
    if row.numbers.dtype not in _CODES:
        raise TypeError(f"{where}: numbers: expected fp32, fp16, bf16 or int8, got {row.numbers.dtype}")
    if row.numbers.shape != (row.layout.size,):
        raise ValueError(f"{where}: numbers: expected [{row.layout.size}], got {list(row.numbers.shape)}")
    if (row.numbers.dtype == torch.int8) != (row.steps is not None):
        raise ValueError(f"{where}: steps: expected with int8 numbers and only with them, got {row.numbers.dtype}")
    if row.steps is not None:
        modules = len(row.layout.segments)
        if row.steps.dtype != torch.float32 or row.steps.shape != (modules,):
            got = f"{row.steps.dtype} {list(row.steps.shape)}"
            raise ValueError(f"{where}: steps: expected torch.float32 [{modules}], got {got}")
    for part, tensor in (("numbers", row.numbers), ("steps", row.steps)):
        if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: {part}: expected finite numbers, got NaN or infinity")


def version_of(record: bytes | memoryview) -> int:
    """The version in a header; nothing else is looked at.

    Raises:
        DamagedRecord: there is no whole header.
    """
    if len(record) < HEADER_SIZE:
        raise DamagedRecord(f"expected a header of {HEADER_SIZE} bytes, got {len(record)}")
    return int(_HEADER.unpack_from(record)[4])


def decode(
    name: str, record: bytes | memoryview, basis: bytes, layout_of: Callable[[bytes], RowLayout | None], store: str
) -> AdapterRow:
    """The row of a record; its numbers are copied once, out of whatever `record` is a view of.

    Args:
        name: of the adapter.
        record: bytes of unknown origin.
        basis: 16 bytes, digest of the manifest they have to belong to.
        layout_of: finds the layout of a digest.
        store: where the record was, for messages.

    Raises:
        DamagedRecord: says which adapter, what was expected and what came.
    """

    def refuse(expected: object, got: object) -> DamagedRecord:
        return DamagedRecord(f"store {store}: adapter {name!r}: expected {expected}, got {got}")

    if len(record) < HEADER_SIZE:
        raise refuse(f"a header of {HEADER_SIZE} bytes", f"{len(record)} bytes")
    magic, form, code, reserved, version, digest, found_basis, count = _HEADER.unpack_from(record)
    if (magic, form) != (MAGIC, FORMAT):
        raise refuse(f"a record {MAGIC!r} of format {FORMAT}", f"{magic!r} of format {form}")
    (stored,) = _CHECKSUM.unpack_from(record, _HEADER.size)
    payload = memoryview(record)[HEADER_SIZE:]
    computed = _checksum(zlib.crc32(payload), name, memoryview(record)[: _HEADER.size])
    if computed != stored:
        raise refuse(f"the checksum {stored:08x}", f"{computed:08x}: its {len(record)} bytes are damaged")
    if found_basis != basis:
        raise refuse(f"a record of the basis {basis.hex()}", found_basis.hex())
    dtype = _DTYPES.get(code)
    if dtype is None or reserved or version < 1:
        raise refuse("a known dtype and a version", f"dtype {code}, version {version}, reserved bits {reserved:#x}")
    layout = layout_of(digest)
    if layout is None:
        raise refuse("a layout that the store has", digest.hex())
    stepped = 4 * len(layout.segments) if dtype == torch.int8 else 0
    if count != layout.size or len(payload) != stepped + count * dtype.itemsize:
        raise refuse(
            f"{layout.size} numbers in {stepped + layout.size * dtype.itemsize} bytes",
            f"{count} in {len(payload)}",
        )
    data = bytearray(payload)
    steps = _tensor(data, torch.float32, len(layout.segments), 0) if stepped else None
    return AdapterRow(name, version, layout, _tensor(data, dtype, count, stepped), steps)


def _checksum(payload: int, name: str, header: bytes | memoryview) -> int:
    """Of a whole record, from that of its payload."""
    return zlib.crc32(header, zlib.crc32(name.encode(), payload))


def _bytes_of(tensor: Tensor) -> bytes:
    plain: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return bytes(plain.data) if plain.size else b""


def _tensor(data: bytearray, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    # torch refuses to look at an empty buffer.
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
