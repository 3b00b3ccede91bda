"""R-only adapters as plain LoRA, without the weights of their base: lora_A = s·R A, lora_B = B."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loraxs_ext import basis
from loraxs_ext.basis import BasisFile, Factors, Recipe
from loraxs_ext.checkpoint.exporting import write_lora
from loraxs_ext.checkpoint.model_folder import WeightStream, find_targets
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.verify import DEFAULT_TOL, Mismatch, flip_signs, report
from loraxs_ext.store import AdapterRow, in_dtype

from .sources import Found

# Part of every digest: a change of what is written is another file.
_FORMAT = "plain LoRA 1, fp32"


class Bases:
    """The bases of one base model, kept in memory as far as adapters have asked for them. Safe for threads.

    Args:
        model: folder of the base model; what is not in the cache of bases is computed from its weights.
        file: of `loraxs init --output`, to take them from instead; None for none.

    Attributes:
        identity: of the files they come from; equal for files that have not changed.

    Raises:
        OSError: the file does not exist.
    """

    def __init__(self, model: Path, file: Path | None = None) -> None:
        self._model, self._file = model, file
        self.identity = tuple(_stamp(path) for path in ([file] if file else sorted(model.glob("*.safetensors"))))
        self._lock = threading.Lock()
        self._recipe: Recipe | None = None
        self._factors: dict[str, Factors] = {}
        self._sketches: dict[str, Tensor] = {}

    def get(self, ranks: Mapping[str, int], recipe: Recipe) -> tuple[Mapping[str, Factors], Mapping[str, Tensor]]:
        """Factors and sketches by module key, of these ranks at least.

        Raises:
            ValueError: the file or model lacks a module or a rank, or stands for another recipe.
            OSError: the file cannot be read.
        """
        with self._lock:
            if self._recipe not in (None, recipe):
                raise ValueError(f"expected adapters of one recipe, got {recipe} beside {self._recipe}")
            lacking = {key: r for key, r in ranks.items() if key not in self._factors or len(self._factors[key].s) < r}
            if lacking:
                found = (
                    self._computed(lacking, recipe) if self._file is None else self._read(self._file, lacking, recipe)
                )
                self._sketches |= {key: basis.sketch(factors) for key, factors in found.items()}
                self._factors |= found
                self._recipe = recipe
            return self._factors, self._sketches

    def _read(self, path: Path, ranks: Mapping[str, int], recipe: Recipe) -> dict[str, Factors]:
        found = {}
        with BasisFile(path) as file:
            if file.recipe != recipe:
                raise ValueError(f"expected bases made by {recipe}, got {path} made by {file.recipe}")
            for key, r in ranks.items():
                name = file.find(key)
                rank = 0 if name is None else file.modules[name].rank
                if name is None or rank < r:
                    raise ValueError(f"expected a basis of {key} of rank {r}, got {path} with rank {rank}")
                found[key] = file.factors(name)
        return found

    def _computed(self, ranks: Mapping[str, int], recipe: Recipe) -> dict[str, Factors]:
        if not self._model.is_dir():
            raise ValueError(
                f"expected the folder of the base model, or a file of its bases (loraxs init --output), got "
                f"{str(self._model)!r}, which is no folder, and no file"
            )
        widest = max(ranks.values())
        pattern = {f"^{re.escape(key)}": r for key, r in ranks.items() if r != widest}
        config = LoraXSConfig(r=widest, rank_pattern=pattern, target_modules=list(ranks))
        targets = find_targets(self._model, config)
        if missing := sorted(set(ranks) - {target.key for target in targets}):
            raise ValueError(f"expected a linear layer {missing[0]}, which {self._model} does not have")
        stream = WeightStream()
        try:
            weights = {target.key: partial(stream.read, target) for target in targets}
            return basis.decompose(weights, ranks, recipe, cache_dir="default")
        finally:
            stream.close()


def digest(found: Found, bases: Bases) -> str:
    """32 hexadecimal digits that say which plain LoRA `write` makes of the adapter; its name has no part in it."""
    row = found.row
    told = hashlib.blake2b(_FORMAT.encode(), digest_size=16, key=row.layout.digest)
    told.update(repr((bases.identity, found.recipe, str(row.numbers.dtype))).encode())
    for key, r, _ in row.layout.segments:
        told.update(_bytes(found.sketches[key][:, :r]))
    for part in (row.numbers, row.steps):
        told.update(b"" if part is None else _bytes(part))
    return told.hexdigest()


def write(found: Found, bases: Bases, folder: Path, base_model: str) -> None:
    """Write the adapter as a plain LoRA; its folder appears whole or not at all.

    Args:
        found: the adapter.
        bases: of its base model.
        folder: to be made.
        base_model: name that the configuration gives for the base.

    Raises:
        ValueError: the adapter stands on other bases than these; as in loading.
        FileExistsError: `folder` exists.
        BlockingIOError: another process or thread is writing it.

    Warns:
        UserWarning: the bases differ slightly from those of the adapter.
    """
    row = found.row
    ranks = {segment.key: segment.r for segment in row.layout.segments}
    if not ranks:
        raise ValueError(f"adapter {row.name!r}: expected at least one module, got none")
    factors, sketches = bases.get(ranks, found.recipe)
    signs, mismatches = {}, []
    for key, r in ranks.items():
        signs[key], errors = basis.compare_sketches(found.sketches[key][:, :r], sketches[key][:, :r])
        mismatches.append(Mismatch(key, float(errors.double().square().mean().sqrt())))
    report(row.name, mismatches, "error", DEFAULT_TOL, found.recipe.tol)
    config = LoraXSConfig(r=row.layout.rank, target_modules=list(ranks), base_model_name_or_path=base_model)
    write_lora(config, _factors(in_dtype(row, torch.float32), factors, signs), {}, folder)


def _factors(
    row: AdapterRow, factors: Mapping[str, Factors], signs: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for index, (key, r, scaling) in enumerate(row.layout.segments):
        start = row.layout.offsets[index]
        core = row.numbers[start : start + r * r].view(r, r)
        a, bt = factors[key].a[:r].float(), factors[key].bt[:r].float()
        scaled = flip_signs(core, signs[key]) * scaling
        yield key, {"lora_A.weight": scaled @ a, "lora_B.weight": bt.mT.contiguous()}


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
