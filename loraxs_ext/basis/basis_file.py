"""The bases of a whole model in one file, which every process and machine that adapts the model can share.

A file holds the factors of every module and their anchors; or the anchors alone, some kilobytes a module, from which
the same bases are found again in the weights. It is addressed by what it was made of: the fingerprints of the weights,
their ranks and the recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .anchor import PROJECTED, Anchor, make_anchor
from .factors import Factors
from .recipe import Recipe
from .sketching import sketch
from .tensor_file import Layout, TensorFile, write_tensors

_FORMAT = "loraxs_basis_file/1"
_DTYPES = {"F32": torch.float32, "F64": torch.float64}
_FACTORS, _ANCHORS = "factors and anchors", "anchors"


class Module(NamedTuple):
    """What a file says about one weight.

    Attributes:
        fingerprint: of the weight.
        shape: (N, K).
        rank: of the basis.
        dtype: of the factors, "F32" or "F64".
        subspace_error: as measured when the basis was made.
    """

    fingerprint: str
    shape: tuple[int, int]
    rank: int
    dtype: str
    subspace_error: float


class BasisFile:
    """A file of `write_basis_file`, open for reading; a context manager.

    Opening reads the header only. Each tensor is read, and its checksum verified, when it is asked for.

    Args:
        path: the file.

    Attributes:
        recipe: how the bases were made.
        address: 16 hexadecimal digits; equal for files made of the same weights by the same recipe at the same ranks.
        modules: by name.
        has_factors: whether the file holds factors beside the anchors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or none of these; the message says what disagrees.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = TensorFile(self.path)
        except ValueError as reason:
            raise self._refused(reason) from None
        try:
            metadata = self._file.metadata
            self._file.expect({"format": _FORMAT})
            self.has_factors = metadata.get("holds") == _FACTORS
            self.recipe = Recipe.from_dict(json.loads(metadata.get("recipe", "")))
            self.modules = {name: _parse(entry) for name, entry in json.loads(metadata.get("modules", "")).items()}
            self.address = _address(self.recipe, self.modules)
            holds = _FACTORS if self.has_factors else _ANCHORS
            self._file.expect({"holds": holds, "address": self.address}, _layout(self.modules, self.has_factors))
        except (ValueError, TypeError, AttributeError, RecursionError) as reason:
            self.close()
            raise self._refused(reason) from None

    def __enter__(self) -> BasisFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def find(self, key: str) -> str | None:
        """The name under which the file knows the module `key`, whichever of the two has a longer prefix.

        A model with a head calls "model.layers.0.fc" what its body calls "layers.0.fc".
        """
        if key in self.modules:
            return key
        alike = [name for name in self.modules if name.endswith("." + key) or key.endswith("." + name)]
        return alike[0] if len(alike) == 1 else None

    def factors(self, name: str) -> Factors:
        """The factors of a module, on the CPU.

        Raises:
            ValueError: the file holds anchors only, or a checksum differs.
        """
        if not self.has_factors:
            raise ValueError(f"basis file {self.path} holds anchors only")
        module = self.modules[name]
        parts = [self._read(name, part) for part in ("a", "bt", "s")]
        return Factors(parts[0], parts[1], parts[2], module.subspace_error, module.fingerprint)

    def anchor(self, name: str) -> Anchor:
        """The anchor of a module.

        Raises:
            ValueError: a checksum differs.
        """
        return Anchor(self._read(name, "anchor"), self._read(name, "s"))

    def sketch(self, name: str) -> Tensor:
        """The sketch of a module's basis, fp32 [5, rank].

        Raises:
            ValueError: its checksum differs.
        """
        return self._read(name, "sketch")

    def _read(self, name: str, part: str) -> Tensor:
        try:
            return self._file.read(f"{name}.{part}")
        except ValueError as reason:
            raise self._refused(reason) from None

    def _refused(self, reason: Exception) -> ValueError:
        return ValueError(f"basis file {self.path} is damaged, or not a file of bases: {reason}")


def write_basis_file(
    path: str | Path, recipe: Recipe, factors: Mapping[str, Factors], *, anchors_only: bool = False
) -> str:
    """Write the bases of a model; the file appears complete and synced, whoever else writes or reads it.

    Args:
        path: of the file; its folder is made.
        recipe: how the factors were made.
        factors: by module name, fp32 or fp64, with fingerprints.
        anchors_only: leave out a and bt.

    Returns:
        The address of the file.

    Raises:
        ValueError: a fingerprint is missing.
        OSError: the file cannot be written.
    """
    modules: dict[str, Module] = {}
    tensors: dict[str, Tensor] = {}
    for name, found in factors.items():
        if found.fingerprint is None:
            raise ValueError(f"factors[{name!r}] must have the fingerprint of their weight, got None")
        shape, rank = (found.bt.shape[1], found.a.shape[1]), len(found.s)
        dtype = "F64" if found.a.dtype == torch.float64 else "F32"
        modules[name] = Module(found.fingerprint, shape, rank, dtype, float(found.subspace_error))
        anchor = make_anchor(found, recipe.sigma)
        parts = {"anchor": anchor.projections, "s": anchor.s.to(_DTYPES[dtype]), "sketch": sketch(found)}
        if not anchors_only:
            parts |= {"a": found.a, "bt": found.bt}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    address = _address(recipe, modules)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": _FORMAT,
        "address": address,
        "holds": _ANCHORS if anchors_only else _FACTORS,
        "recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "modules": json.dumps(modules),
    }
    write_tensors(path, tensors, metadata)
    return address


def _address(recipe: Recipe, modules: Mapping[str, Module]) -> str:
    made_of = {name: module[:-1] for name, module in modules.items()}
    told = json.dumps([_FORMAT, recipe.to_dict(), made_of], sort_keys=True)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def _parse(entry: Any) -> Module:
    fingerprint, (N, K), rank, dtype, error = entry
    sizes_are_whole = all(type(size) is int and size > 0 for size in (N, K, rank))
    if not (sizes_are_whole and isinstance(fingerprint, str) and dtype in _DTYPES and type(error) in (int, float)):
        raise ValueError(f"it describes a module as {entry!r}")
    return Module(fingerprint, (N, K), rank, dtype, float(error))


def _layout(modules: Mapping[str, Module], has_factors: bool) -> dict[str, Layout]:
    layout: dict[str, Layout] = {}
    for name, (_, (N, K), rank, kind, _) in modules.items():
        layout[f"{name}.anchor"] = Layout(torch.float32, (rank, rank + PROJECTED))
        layout[f"{name}.s"] = Layout(_DTYPES[kind], (rank,))
        layout[f"{name}.sketch"] = Layout(torch.float32, (5, rank))
        if has_factors:
            layout[f"{name}.a"] = Layout(_DTYPES[kind], (rank, K))
            layout[f"{name}.bt"] = Layout(_DTYPES[kind], (rank, N))
    return layout
