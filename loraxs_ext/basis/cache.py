"""Computed factors on disk, addressed by the weight's fingerprint and the recipe.

One safetensors file per weight, recipe and rank. A file is believed only if its name, header, shapes, types and
checksum all agree; anything else is recomputed with a warning. Files are written under a temporary name, synced and
renamed, so concurrent processes see a whole file or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .recipe import Recipe

_FORMAT = "loraxs_basis/1"
# Ours takes less than 1 KiB.
_HEADER_LIMIT = 1 << 16
_NAME = re.compile(r"-r(\d+)\.safetensors$")


class Entry(NamedTuple):
    """Factors of one weight as they are stored: with what was measured at every rank up to their own.

    Attributes:
        a, bt: [R, K] and [R, N], fp32 or fp64.
        s: [R] singular values, in the dtype of a.
        errors, gaps: [R] fp64, subspace error and relative gap for each rank 1…R.
        steps: [1] int64, Lanczos steps.
    """

    a: Tensor
    bt: Tensor
    s: Tensor
    errors: Tensor
    gaps: Tensor
    steps: Tensor

    def cut(self, rank: int) -> Entry:
        """The entry of a smaller rank."""
        a, bt, s, errors, gaps, steps = self
        return Entry(a[:rank], bt[:rank], s[:rank], errors[:rank], gaps[:rank], steps)


def cache_directory(choice: str | Path | Literal["default"] | None) -> Path | None:
    """Where the cache lies: None for none; "default": $LORAXS_CACHE, or ~/.cache/loraxs_ext; else the path itself."""
    if choice is None:
        return None
    if choice == "default":
        choice = os.environ.get("LORAXS_CACHE") or Path.home() / ".cache" / "loraxs_ext"
    return Path(choice).expanduser()


class BasisCache:
    """Stored entries of one recipe under one directory, which is made when first written to.

    Args:
        directory: root of the cache.
        recipe: all of its fields are part of the address.
    """

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory = directory
        self.recipe = json.dumps(recipe.to_dict(), sort_keys=True)
        self.tol = recipe.tol
        self._recipe_hash = hashlib.blake2b(self.recipe.encode(), digest_size=4).hexdigest()

    def load(self, key: str, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> Entry | None:
        """The entry of the smallest stored rank that serves `rank`, cut to it; None if there is none.

        A larger rank serves if the subspace error at `rank` meets the tolerance too.

        Args:
            key: fingerprint of the weight.
            shape: (N, K) of the weight.
            dtype: fp32 or fp64, of the factors.
            rank: number of triplets wanted.
        """
        for stored, path in self._candidates(key, dtype):
            if stored < rank:
                continue
            try:
                entry = self._read(path, key, shape, dtype, stored)
            except (OSError, SafetensorError, ValueError, RecursionError) as reason:
                warnings.warn(
                    f"cached basis {path} is damaged or foreign and is computed anew: {reason}",
                    RuntimeWarning,
                    stacklevel=3,
                )
                continue
            if stored == rank or float(entry.errors[rank - 1]) <= self.tol:
                return entry.cut(rank)
        return None

    def store(self, key: str, entry: Entry) -> None:
        """Write an entry; a directory that cannot be written to is warned of, not fatal."""
        tensors = {name: part.detach().cpu().contiguous() for name, part in entry._asdict().items()}
        header = {"format": _FORMAT, "recipe": self.recipe, "fingerprint": key}
        header["checksum"] = _checksum(save(tensors, header))
        path = self._path(key, entry.a.dtype, len(entry.s))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(tensors, header))
        except OSError as reason:
            warnings.warn(f"the basis cache {self.directory} cannot be written: {reason}", RuntimeWarning, stacklevel=3)

    def _path(self, key: str, dtype: torch.dtype, rank: int | str) -> Path:
        bits = 64 if dtype == torch.float64 else 32
        return self.directory / key[:2] / f"{key}-{self._recipe_hash}-f{bits}-r{rank}.safetensors"

    def _candidates(self, key: str, dtype: torch.dtype) -> Iterator[tuple[int, Path]]:
        """Stored ranks and their files, from the smallest rank up."""
        pattern = self._path(key, dtype, "*")
        found = ((_NAME.search(path.name), path) for path in pattern.parent.glob(pattern.name))
        yield from sorted((int(match[1]), path) for match, path in found if match)

    def _read(self, path: Path, key: str, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> Entry:
        data = path.read_bytes()
        # The header is a little-endian length followed by JSON; its sizes are checked before any tensor is made.
        length = _header_length(data)
        if length > _HEADER_LIMIT:
            raise ValueError(f"its header claims {length} bytes")
        header = json.loads(data[8 : 8 + length])
        if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
            raise ValueError("its header is not that of a safetensors file")
        metadata = header.pop("__metadata__", {})
        expected_fields = {
            "format": _FORMAT,
            "recipe": self.recipe,
            "fingerprint": key,
            "checksum": _checksum(data),
        }
        for field, expected in expected_fields.items():
            if metadata.get(field) != expected:
                raise ValueError(f"its {field} is {metadata.get(field)!r}, expected {expected!r}")
        kind = "F64" if dtype == torch.float64 else "F32"
        expected_layout = {
            "a": (kind, [rank, shape[1]]),
            "bt": (kind, [rank, shape[0]]),
            "s": (kind, [rank]),
            "errors": ("F64", [rank]),
            "gaps": ("F64", [rank]),
            "steps": ("I64", [1]),
        }
        layout = {name: (entry.get("dtype"), entry.get("shape")) for name, entry in header.items()}
        if layout != expected_layout:
            raise ValueError(f"it holds {layout}, expected {expected_layout}")
        return Entry(**load(data))


def _checksum(data: bytes) -> str:
    """Hash of all tensors of a safetensors file: what follows its header."""
    return hashlib.blake2b(data[8 + _header_length(data) :], digest_size=16).hexdigest()


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when it is complete and on the disk."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
