"""One file for all sections, each replaced when it is measured anew, and what was promised."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._measure import environment, write_json

KIND = "serving"
# Figures of a machine belong together only as long as these are the same.
SAME = ("device", "threads", "torch", "python")

Row = Mapping[str, Any]


def merge(path: Path, section: str, rows: Sequence[Row], *, smoke: bool = False) -> dict[str, Any]:
    """Put the rows of a section in the place of its older ones, and write the file anew.

    Sections that were measured on another machine, or with other versions, are dropped; every section says when and at
    which commit it was measured.

    Args:
        path: the JSON file; it may be missing.
        section: name of the section.
        rows: each with the field `section`.
        smoke: whether the rows are those of a walk through the code, which no report takes for figures.

    Raises:
        ValueError: there is something else at `path`.
    """
    now = environment()
    sections: dict[str, Any] = {}
    kept: list[Row] = []
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict) or before.get("kind") != KIND:
            raise ValueError(f"{path}: expected results of kind {KIND!r}, got something else")
        fits = before["dry_run"] == smoke and all(before["environment"].get(name) == now[name] for name in SAME)
        sections = dict(before["sections"]) if fits else {}
        kept = [row for row in before["rows"] if row["section"] in sections and row["section"] != section]
    sections[section] = {name: now[name] for name in ("date", "commit", "uncommitted_changes")}
    all_rows = [*kept, *rows]
    result = {
        "kind": KIND,
        "dry_run": smoke,
        "environment": now,
        "sections": sections,
        "targets": [] if smoke else judge(all_rows),
        "rows": all_rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def judge(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every promise with its worst figure, and whether it is kept; null where nothing was measured."""
    ours = [row for row in rows if row["section"] == "generation" and row["provider"] == "loraxs"]
    by_adapters: dict[int, list[Row]] = {}
    for row in ours:
        by_adapters.setdefault(row["adapters"], []).append(row)
    verdicts = []
    for adapters in (1, 8, 64, 1000):
        some = by_adapters.get(adapters)
        # In the dtype that a user of this machine would choose.
        fastest = max(some, key=lambda row: row["tokens_per_second"]["base model"]) if some else None
        what = f"tokens/s with {adapters} distinct adapters, over the base model alone"
        verdicts.append(_verdict(what, 0.95, fastest and fastest["ratio"], at_least=True))
    attach = _one(rows, "attach")
    verdicts.append(_verdict("cold attach, p99 in ms", 2.0, attach and attach["p99_ms"], at_least=False))
    zipf = _one(rows, "zipf")
    verdicts.append(_verdict("Zipf trace, tokens/s over all-resident", 0.95, zipf and zipf["ratio"], at_least=True))
    verdicts.append(_verdict("Zipf trace, failed requests", 0, zipf and zipf["failed_requests"], at_least=False))
    return verdicts


def _one(rows: Sequence[Row], section: str) -> Row | None:
    return next((row for row in rows if row["section"] == section), None)


def _verdict(what: str, limit: float, found: float | None, *, at_least: bool) -> dict[str, Any]:
    met = None if found is None else found >= limit if at_least else found <= limit
    return {"target": what, "limit": limit, "at_least": at_least, "found": found, "met": met}
