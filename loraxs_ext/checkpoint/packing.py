"""Adapter folders into an `AdapterStore` and out of it again: R bit for bit, without the base model."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraxs_ext.basis.sketching import compare_sketches
from loraxs_ext.files import atomic_folder
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.transport import root_mean_square
from loraxs_ext.peft.verify import flip_signs
from loraxs_ext.store import AdapterRow, AdapterStore, DamagedRecord, Manifest, RowLayout, in_dtype
from loraxs_ext.store.names import encode_name

from .adapter_folder import PREFIX, SKETCH_ROWS, config_of, read_adapter_folder
from .streaming import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config

Outcome = Literal["added", "replaced", "unchanged", "refused"]
# Adapters a transaction: its waiting for the disk is then shared by many.
_BATCH = 256


class Packed(NamedTuple):
    """What became of one folder.

    Attributes:
        folder, name: of the adapter.
        outcome: "added", "replaced", "unchanged" for one that is in the store already, or "refused".
        reason: why it was refused.
    """

    folder: Path
    name: str
    outcome: Outcome
    reason: str | None = None


def find_adapters(roots: Iterable[Path], prefix: str = "") -> dict[str, Path]:
    """Adapter folders at and below `roots`, by the names their adapters get: paths from the root, or the root's name.

    Hidden folders are passed over.

    Args:
        roots: folders.
        prefix: of the names.

    Raises:
        NotADirectoryError: a root is not a folder.
        ValueError: two folders would get the same name.
    """
    found: dict[str, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: expected a folder")
        for file in sorted(root.rglob(ADAPTER_CONFIG)):
            folder = file.parent
            inside = folder.relative_to(root).as_posix()
            if any(part.startswith(".") for part in folder.relative_to(root).parts):
                # Of a writer that was killed.
                continue
            name = prefix + (root.resolve().name if inside == "." else inside)
            if name in found:
                raise ValueError(f"expected a name for every adapter, got {name!r} for {found[name]} and {folder}")
            found[name] = folder
    return found


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a store for adapters like this one: its basis, targets, and ranks as the largest.

    Raises:
        OSError, ValueError or TypeError: as `read_adapter_folder`.
    """
    adapter = read_adapter_folder(folder)
    config = {name: value for name, value in read_adapter_config(folder).items() if name != "base_fingerprint"}
    sketches = dict(zip(adapter.layout.index, _split(adapter.sketches, adapter.layout), strict=True))
    recipe = adapter.config.recipe().to_dict()
    return Manifest(adapter.config.base_fingerprint or "", recipe, config, sketches)


def row_of(name: str, folder: Path, manifest: Manifest) -> AdapterRow:
    """The row of an adapter folder, on the basis of the store; in the dtype R was trained in if it is one of a store's.

    Where singular vectors of the adapter's basis point the other way, rows and columns of R change sign.

    Raises:
        OSError, ValueError or TypeError: as `read_adapter_folder`; or the adapter stands on another basis.
    """
    config, layout, numbers, sketches = read_adapter_folder(folder)
    ours, theirs = manifest.recipe.get("sigma"), config.sigma
    if ours != theirs:
        raise ValueError(f"{folder}: expected singular values placed by sigma={ours!r}, got {theirs!r}")
    try:
        expected = _expected(manifest, layout)
        if not torch.equal(sketches, expected):
            numbers = _moved(numbers, sketches, expected, layout, float(manifest.recipe["tol"]))
    except ValueError as reason:
        raise ValueError(f"{folder}: {reason}") from None
    return AdapterRow(name, 0, layout, numbers.float() if numbers.dtype == torch.float64 else numbers)


@functools.lru_cache(maxsize=64)
def _expected(manifest: Manifest, layout: RowLayout) -> Tensor:
    """The sketches that adapters of this layout have to have, end to end.

    Raises:
        ValueError: the store's basis has not these modules, or not at these ranks.
    """
    unknown = [key for key in layout.index if key not in manifest.ranks]
    if unknown:
        raise ValueError(
            f"expected modules of the store's basis, which has {len(manifest.ranks)}, got {len(unknown)} of "
            f"{len(layout.segments)} that it does not know, one of them {unknown[0]!r}"
        )
    for key, r, _ in layout.segments:
        if r > manifest.ranks[key]:
            raise ValueError(f"{key}: expected a rank of at most {manifest.ranks[key]}, the store's, got {r}")
    return torch.cat([manifest.sketches[key][:, :r].flatten() for key, r, _ in layout.segments])


def _moved(numbers: Tensor, stored: Tensor, expected: Tensor, layout: RowLayout, tolerance: float) -> Tensor:
    """R on the vectors of the store, which may point the other way.

    Raises:
        ValueError: they differ by more than the accuracy that the recipe asks of a basis.
    """
    parts, worst, where = [], 0.0, ""
    matrices = numbers.split([r * r for _, r, _ in layout.segments])
    pairs = zip(layout.segments, matrices, _split(stored, layout), _split(expected, layout), strict=True)
    for (key, r, _), R, old, new in pairs:
        signs, errors = compare_sketches(old, new)
        error = root_mean_square(errors)
        if not error <= worst:
            worst, where = error, key
        parts.append(flip_signs(R.view(r, r), signs).flatten())
    if not worst <= tolerance:
        raise ValueError(
            f"expected an adapter of the store's basis, got one of another base model or recipe: {where} differs by "
            f"{worst:.3g}, accepted up to {tolerance:.3g}"
        )
    return torch.cat(parts)


def _split(sketches: Tensor, layout: RowLayout) -> list[Tensor]:
    """[5, r] of each module."""
    parts = sketches.split([SKETCH_ROWS * r for _, r, _ in layout.segments])
    return [part.view(SKETCH_ROWS, r) for part, (_, r, _) in zip(parts, layout.segments, strict=True)]


def pack(
    store: AdapterStore,
    folders: Mapping[str, Path],
    *,
    dtype: torch.dtype | None = torch.float32,
    jobs: int = 4,
    strict: bool = False,
    dry_run: bool = False,
) -> Iterator[Packed]:
    """Put adapter folders into a store; what is there with the same content already is left alone.

    Killed and called again, it goes on where it was: each transaction of adapters is there or not.

    Args:
        store: of the basis of these adapters.
        folders: by the name of the adapter.
        dtype: fp32, fp16, bf16 or int8; None for the one of each R.
        jobs: threads that read.
        strict: stop at the first adapter that is refused.
        dry_run: write nothing.

    Yields:
        What became of each folder, in order, once it is committed.

    Raises:
        ValueError: `strict`, and an adapter was refused.
    """

    def read(entry: tuple[str, Path]) -> AdapterRow | Packed:
        name, folder = entry
        try:
            encode_name(name)
            row = row_of(name, folder, store.manifest)
            return row if dtype is None else in_dtype(row, dtype)
        except (OSError, ValueError, TypeError) as reason:
            return Packed(folder, name, "refused", str(reason))

    entries = iter(folders.items())
    with ThreadPoolExecutor(jobs) as threads:
        while batch := list(islice(entries, _BATCH)):
            outcomes: list[Packed] = []
            rows: list[AdapterRow] = []
            for (name, folder), result in zip(batch, threads.map(read, batch), strict=True):
                if isinstance(result, AdapterRow):
                    outcome = _compared(store, result)
                    if outcome != "unchanged":
                        rows.append(result)
                    result = Packed(folder, name, outcome)
                outcomes.append(result)
            refused = next((one for one in outcomes if one.outcome == "refused"), None)
            if strict and refused is not None:
                raise ValueError(f"{refused.name!r} was refused: {refused.reason}")
            if not dry_run:
                store.put_many(rows)
            yield from outcomes


def _compared(store: AdapterStore, row: AdapterRow) -> Outcome:
    """What putting the row would do."""
    try:
        there = store.row(row.name)
    except KeyError:
        return "added"
    except DamagedRecord:
        # So it is no loss.
        return "replaced"
    same = there.layout == row.layout and there.numbers.dtype == row.numbers.dtype
    for ours, theirs in ((row.numbers, there.numbers), (row.steps, there.steps)):
        if ours is not None and theirs is not None:
            same = same and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    return "unchanged" if same else "replaced"


def unpack(
    store: AdapterStore, name: str, folder: Path, *, version: int | None = None, overwrite: bool = False
) -> None:
    """Write an adapter of a store as a folder that PEFT loads; an fp32 R bit for bit.

    A TinyLoRA comes back as the R it stands for. The scaling of each module is the same, however the configuration
    it came with expressed it.

    Args:
        store: with the adapter.
        name: of the adapter.
        folder: to be made; it appears whole or not at all.
        version: one that is kept; None for the current one.
        overwrite: replace an adapter that is there.

    Raises:
        KeyError: there is no such adapter.
        FileExistsError: `folder` exists.
    """
    row = store.row(name, version)
    if row.steps is not None:
        row = in_dtype(row, torch.float32)
    tensors = {}
    for (key, r, _), offset in zip(row.layout.segments, row.layout.offsets, strict=True):
        # Copies, because safetensors wants no two tensors in one memory.
        tensors[f"{PREFIX}{key}.loraxs_R.weight"] = row.numbers[offset : offset + r * r].view(r, r).clone()
        tensors[f"{PREFIX}{key}.loraxs_R.sketch"] = store.manifest.sketches[key][:, :r].contiguous()
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        save_file(tensors, temporary / ADAPTER_WEIGHTS, {"format": "pt"})
        _config_for(row.layout, store.manifest).save_pretrained(str(temporary))


def _config_for(layout: RowLayout, manifest: Manifest) -> LoraXSConfig:
    """The configuration of an adapter of plain R with this layout."""
    values: dict[str, Any] = json.loads(json.dumps(dict(manifest.config)))
    use_rslora = bool(values.get("use_rslora"))
    alphas = {key: _alpha(s, math.sqrt(r) if use_rslora else r) for key, r, s in layout.segments}
    most = max(layout.segments, key=lambda segment: segment.r)
    values |= {
        "r": most.r,
        "lora_alpha": alphas[most.key],
        "rank_pattern": {_only(key): r for key, r, _ in layout.segments if r != most.r},
        "alpha_pattern": {_only(key): alpha for key, alpha in alphas.items() if alpha != alphas[most.key]},
        "use_tinylora": False,
        "init_weights": True,
        "save_basis": False,
        "inference_mode": True,
    }
    if set(layout.index) == set(manifest.sketches):
        values["base_fingerprint"] = manifest.fingerprint or None
    else:
        targets = "|".join(re.escape(key) for key in layout.index)
        values |= {"target_modules": targets, "exclude_modules": None}
        values |= {"layers_to_transform": None, "layers_pattern": None}
    return config_of(values)


def _only(key: str) -> str:
    """A pattern for this module alone."""
    return f"^{re.escape(key)}"


def _alpha(scaling: float, divisor: float) -> float:
    """alpha with alpha / divisor == scaling; one unit in the last place away where there is none."""
    near = scaling * divisor
    candidates = [near, round(near), round(near, 6), math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    alpha = min(candidates, key=lambda alpha: abs(alpha / divisor - scaling))
    return int(alpha) if float(alpha).is_integer() else alpha
