"""Safetensors files that are believed only if sizes and checksums agree, and that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loraxs_ext.files import atomic_file, parse_object
from loraxs_ext.files.safetensors import bytes_of, entry, parse_header, read_header, text_fields, write_shard

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
            text, size = read_header(self._file)
            self._start = 8 + len(text)
            self.metadata, self._places = parse_header(text, size)
            self.layout = {name: Layout(dtype, shape) for name, (dtype, shape, _) in self._places.items()}
            self._checksums = text_fields(parse_object(self.metadata.pop(_CHECKSUMS, ""), "its checksums"))
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
        place = self._places[name]
        data = bytearray(place.nbytes)
        self._file.seek(self._start + place.begin)
        if self._file.readinto(data) != len(data) or _checksum(data) != self._checksums.get(name):
            raise ValueError(f"the checksum of its tensor {name!r} does not agree")
        return place._replace(begin=0).read(data)

    def expect(self, metadata: Mapping[str, str], layout: Mapping[str, Layout] | None = None) -> None:
        """Raise ValueError unless the file has these text fields, and exactly these tensors."""
        for field, expected in metadata.items():
            if self.metadata.get(field) != expected:
                raise ValueError(f"its {field} is {self.metadata.get(field)!r}, expected {expected!r}")
        if layout is not None and self.layout != dict(layout):
            wrong = sorted(name for name in {*layout, *self.layout} if layout.get(name) != self.layout.get(name))[0]
            raise ValueError(f"its tensor {wrong!r} is {self.layout.get(wrong)}, expected {layout.get(wrong)}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file for `TensorFile`; it appears under its name complete and synced.

    Args:
        path: its folder must exist.
        tensors: of the dtypes that a header can name.
        metadata: text fields.
    """
    # The widest first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in ordered}
    sums = json.dumps({name: _checksum(bytes_of(tensor)) for name, tensor in plain.items()})
    entries = [entry(name, t.dtype, t.shape, partial(plain.__getitem__, name)) for name, t in plain.items()]
    with atomic_file(path) as temporary:
        for _ in write_shard(temporary, entries, {**metadata, _CHECKSUMS: sums}):
            pass


def _checksum(data: bytearray | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
