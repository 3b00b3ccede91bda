"""Turns result files into the README's tables and into plots.

    python benchmarks/report.py                        all of benchmarks/results, as Markdown on stdout
    python benchmarks/report.py a.json b.json          these files
    python benchmarks/report.py --plots docs/figures   also figures, as PNG and SVG

A table or a figure says on which device, when and at which commit it was measured. A file that does not is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._measure import RESULTS  # noqa: E402
from benchmarks._tables import TABLES, generic_table  # noqa: E402

Result = Mapping[str, Any]
REQUIRED = ("device", "date", "commit")


class NotAResult(ValueError):
    """The file cannot be reported; the message says what it lacks."""


def load(path: Path) -> Result:
    """A result file with everything that a caption needs.

    Raises:
        NotAResult: no JSON object, no environment, an empty field of it, a dry run, or no rows.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NotAResult(f"{path}: expected JSON, got {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("environment"), dict):
        raise NotAResult(f"{path}: environment: expected what the figures were measured on, got none")
    missing = [name for name in REQUIRED if not result["environment"].get(name)]
    if missing:
        raise NotAResult(f"{path}: environment: expected {', '.join(missing)}, got none")
    if result.get("dry_run"):
        raise NotAResult(f"{path}: dry_run: expected measured rows, got those of a dry run")
    if not result.get("rows"):
        raise NotAResult(f"{path}: rows: expected at least one, got none")
    return result


def caption(result: Result) -> str:
    """Device, versions, date and commit in one line."""
    found = result["environment"]
    parts = [found["device"]]
    parts += [f"{found['threads']} threads"] if "driver" not in found and "threads" in found else []
    parts += [f"driver {found['driver']}"] if found.get("driver") else []
    parts += [f"{name} {found[name]}" for name in ("torch", "triton") if found.get(name)]
    changed = " with uncommitted changes" if found.get("uncommitted_changes") else ""
    return ", ".join([*parts, found["date"][:10], f"commit {found['commit'][:10]}{changed}"])


def markdown(name: str, result: Result) -> str:
    """The tables of one file; the shape of its rows tells which."""
    tables = next((table for fits, table in TABLES if fits(result)), generic_table)
    return f"### {name}\n\n{tables(result)}\n\n*{caption(result)}*\n"


def plot(name: str, result: Result, folder: Path) -> list[Path]:
    """A figure per rank of the ratios in a file, as PNG and SVG; none where a file has no ratios.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from benchmarks._plots import draw

    paths = []
    for r in sorted({row["r"] for row in result["rows"] if "r" in row}):
        figure = draw([row for row in result["rows"] if row["r"] == r], f"{name}, r = {r}", caption(result))
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            path = folder / f"{name}-r{r}.{kind}"
            partial = path.with_name(f"{path.name}.partial")
            figure.savefig(partial, format=kind, bbox_inches="tight", dpi=120)
            partial.replace(path)
            paths.append(path)
    return paths


def main(argv: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="result files; default all of benchmarks/results")
    parser.add_argument("--plots", type=Path, help="folder for the figures; needs matplotlib")
    arguments = parser.parse_args(argv)
    status = 0
    for path in arguments.files or sorted(RESULTS.glob("*.json")):
        try:
            result = load(path)
        except (NotAResult, OSError) as error:
            print(f"report: {error}", file=sys.stderr)
            status = 1
            continue
        show(markdown(path.stem, result))
        if arguments.plots:
            for figure in plot(path.stem, result, arguments.plots):
                show(f"![{path.stem}]({figure})\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
