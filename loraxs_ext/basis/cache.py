"""Computed factors on disk, addressed by the weight's fingerprint and the recipe.

One file per weight, recipe and rank. A file is believed only if its name, header, shapes, types and checksums all
agree; anything else is recomputed with a warning. Concurrent processes see a whole file or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .recipe import Recipe
from .tensor_file import Layout, TensorFile, write_tensors

_FORMAT = "loraxs_basis/2"
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
        # Only converged factors of a larger rank begin with those of a smaller one.
        self._nested_up_to = 0.0 if recipe.svd == "reference" else recipe.tol
        self._recipe_hash = hashlib.blake2b((_FORMAT + self.recipe).encode(), digest_size=4).hexdigest()

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
            except (OSError, ValueError) as reason:
                warnings.warn(
                    f"cached basis {path} is damaged or foreign and is computed anew: {reason}",
                    RuntimeWarning,
                    stacklevel=3,
                )
                continue
            if stored == rank or float(entry.errors[rank - 1]) <= self._nested_up_to:
                return entry.cut(rank)
        return None

    def store(self, key: str, entry: Entry) -> None:
        """Write an entry; a directory that cannot be written to is warned of, not fatal."""
        header = {"format": _FORMAT, "recipe": self.recipe, "fingerprint": key}
        path = self._path(key, entry.a.dtype, len(entry.s))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, entry._asdict(), header)
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
        layout = {
            "a": Layout(dtype, (rank, shape[1])),
            "bt": Layout(dtype, (rank, shape[0])),
            "s": Layout(dtype, (rank,)),
            "errors": Layout(torch.float64, (rank,)),
            "gaps": Layout(torch.float64, (rank,)),
            "steps": Layout(torch.int64, (1,)),
        }
        with TensorFile(path) as file:
            file.expect({"format": _FORMAT, "recipe": self.recipe, "fingerprint": key}, layout)
            return Entry(**{name: file.read(name) for name in layout})
