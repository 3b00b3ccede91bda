"""Rows of text from CSV, TSV, JSON or a `datasets` folder, and a dev split that is always the same."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraxs_ext.files import parse_object

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows, and the class names that a `datasets` folder records for some of its columns."""

    path: str
    rows: list[Row]
    class_names: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.rows)


def read_table(path: str, required: Sequence[str], optional: Sequence[str] = (), limit: int | None = None) -> Table:
    """Read the named columns.

    Args:
        path: a .csv, .tsv, .jsonl or .json file in UTF-8, or a folder that `Dataset.save_to_disk` wrote; of a
            `DatasetDict`, the folder of one split.
        required: columns that every row has.
        optional: columns that may be absent.
        limit: read that many rows, from the first.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the file is malformed or lacks a column; the message names file and line.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"expected a .csv, .tsv, .jsonl or .json file or a `datasets` folder, found nothing at {path}"
        )
    names: dict[str, list[str]] = {}
    if place.is_dir():
        rows, names = _from_datasets(place, required)
    elif place.suffix in _READERS:
        rows = _READERS[place.suffix](place)
    else:
        raise ValueError(f"{path}: expected a file ending in {', '.join(_READERS)} or a `datasets` folder")
    wanted = [*required, *optional]
    kept: list[Row] = []
    for number, row in rows:
        if len(kept) == limit:
            break
        if missing := [name for name in required if row.get(name) is None]:
            raise ValueError(f"{path}, {number}: expected a value for {missing[0]!r}; there are {', '.join(row)}")
        kept.append({name: row[name] for name in wanted if row.get(name) is not None})
    if not kept:
        raise ValueError(f"{path}: expected at least one row, got none")
    return Table(path, kept, names)


def split_off(rows: Sequence[Row], size: float, columns: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """(train, dev): a split that depends on the texts alone, not on their order, and has no text on both sides.

    Args:
        rows: all of them.
        size: of dev: a share of the different texts below 1, else how many of them.
        columns: the texts.

    Raises:
        ValueError: a side would be empty.
    """
    digests = [hashlib.sha256(json.dumps([str(row.get(c)) for c in columns]).encode()).digest() for row in rows]
    order = sorted(set(digests))
    count = round(size * len(order)) if size < 1 else int(size)
    if not 0 < count < len(order):
        raise ValueError(
            f"data.dev_size: expected to leave rows on both sides, got {size:g} of {len(order)} different texts"
        )
    chosen = set(order[:count])
    train = [row for row, digest in zip(rows, digests, strict=True) if digest not in chosen]
    return train, [row for row, digest in zip(rows, digests, strict=True) if digest in chosen]


def content_digest(path: str) -> str:
    """64 bits of what the file, or the `datasets` folder, holds, in hex; FileNotFoundError if there is neither."""
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"expected a file or a `datasets` folder, found nothing at {path}")
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(place.rglob("*.arrow")) if place.is_dir() else [place]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _delimited(**dialect: Any) -> Callable[[Path], Iterator[tuple[str, Row]]]:
    def read(path: Path) -> Iterator[tuple[str, Row]]:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True, **dialect)
            try:
                for row in reader:
                    if None in row or None in row.values():
                        fields = len(reader.fieldnames or ())
                        raise ValueError(
                            f"{path}, line {reader.line_num}: expected {fields} fields, as in the first line"
                        )
                    yield f"line {reader.line_num}", row
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error

    return read


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            yield f"line {number}", parse_object(line, f"{path}, line {number}")


def _json_array(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON array of objects: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON array of objects")
    yield from ((f"row {i}", row) for i, row in enumerate(rows))


def _from_datasets(path: Path, required: Sequence[str]) -> tuple[Iterator[tuple[str, Row]], dict[str, list[str]]]:
    try:
        from datasets import ClassLabel, DatasetDict, load_from_disk
    except ImportError as error:
        raise ImportError(f'{path}: reading it needs datasets: pip install "loraxs-ext[train]"') from error
    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        raise ValueError(f"{path}: expected one split, got the folder of several: {', '.join(dataset)}; add its name")
    if missing := [name for name in required if name not in dataset.column_names]:
        raise ValueError(f"{path}: expected a column {missing[0]!r}; there are {', '.join(dataset.column_names)}")
    names = {name: list(f.names) for name, f in dataset.features.items() if isinstance(f, ClassLabel)}
    return ((f"row {i}", row) for i, row in enumerate(dataset)), names


_READERS = {
    ".csv": _delimited(),
    # In GLUE's files a quotation mark is a character like any other.
    ".tsv": _delimited(delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": _json_lines,
    ".json": _json_array,
}
