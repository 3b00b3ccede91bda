"""The Markdown tables of `report`: one function per kind of result file, and one for kinds yet unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks import _serving_tables

Result = Mapping[str, Any]
Row = Mapping[str, Any]

VERDICTS = {True: "met", False: "**not met**", None: "not measured"}


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; its columns are not padded."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def linear_tables(result: Result, r: int = 16) -> str:
    """Ratios to F.linear at one rank: a row per dtype and width, a column per provider, all M in a cell."""
    rows = [row for row in result["rows"] if row["r"] == r]
    tokens = list(dict.fromkeys(row["M"] for row in rows))
    providers = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    found = []
    for backward, some in _grouped(rows, lambda row: row["backward"]):
        lines = []
        for (dtype, width), cells in _grouped(some, lambda row: (row["dtype"], row["width"])):
            at = {row["M"]: row for row in cells}
            lines.append(
                [
                    f"{dtype}, width {width}",
                    *(_slashes(at[M]["ratio"].get(p) if M in at else None for M in tokens) for p in providers),
                ]
            )
        found.append(table(["forward + backward" if backward else "forward", *providers], lines))
    title = f"Time over that of `F.linear`, r = {r}, M = {' / '.join(map(str, tokens))} tokens."
    return "\n\n".join([title, *found])


def basis_tables(result: Result) -> str:
    """Seconds for the whole model and the worst error of every provider, then the cache and what was promised."""
    compared = [row for row in result["rows"] if "worst_error" in row]
    providers = list(dict.fromkeys(name for row in compared for name in row["seconds_for_96"]))
    lines = [
        [
            f"{row['spectrum']}, {row['rank']}, {row['threads']}",
            *(_seconds_and_error(row["seconds_for_96"].get(p), row["worst_error"].get(p)) for p in providers),
        ]
        for row in compared
    ]
    title = f"Seconds for the bases of {result['matrices']} matrices, and in brackets the worst error."
    parts = [title, table(["spectrum, rank, threads", *providers], lines)]
    for row in result["rows"]:
        if "cache_warm_seconds" in row:
            parts.append(
                f"{row['matrices']} matrices at rank {row['rank']}, {row['threads']} threads, with an empty cache "
                f"{row['cache_cold_seconds']:.2f} s, from the cache {row['cache_warm_seconds']:.2f} s."
            )
    promised = [[name, VERDICTS[met]] for name, met in result.get("targets", {}).items()]
    return "\n\n".join([*parts, *([table(["target", ""], promised)] if promised else [])])


def _seconds_and_error(seconds: float | None, error: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.1f} ({'–' if error is None else f'{error:.1e}'})"


def gpu_tables(result: Result) -> str:
    """Targets, stages and ceilings; then per kind and width the ratios to the base, and the share of the limit."""
    ceilings = result.get("ceilings") or {}
    parts = []
    if ceilings:
        parts.append(
            f"Ceilings measured in the same run: {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s copied (read and "
            f"written), {ceilings['bf16_flop_per_second'] / 1e12:.0f} TFLOP/s in bf16."
        )
    targets = [
        [verdict["target"], _number(verdict["limit"]), _number(verdict["worst"]), VERDICTS[verdict["met"]]]
        for verdict in result.get("targets", [])
    ]
    if targets:
        parts.append(table(["target", "at most", "worst measured", ""], targets))
    for kind, rows in _grouped(result["rows"], lambda row: row["kind"]):
        tokens = list(dict.fromkeys(row["M"] for row in rows))
        base = rows[0]["base"]
        providers = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
        lines = []
        for (K, N, r), cells in _grouped(rows, lambda row: (row["K"], row["N"], row["r"])):
            at = {row["M"]: row for row in cells}
            shares = _slashes((at[M]["share_of_limit"].get("loraxs") if M in at else None for M in tokens), "{:.0%}")
            ratios = [_slashes(at[M]["ratio"].get(p) if M in at else None for M in tokens) for p in providers]
            lines.append([f"{K} → {N}, r = {r}", *ratios, shares])
        title = f"{kind.capitalize()}: time over that of `{base}`, M = {' / '.join(map(str, tokens))}; medians."
        parts += [title, table(["shape", *providers, "share of limit, loraxs"], lines)]
    if result.get("missing"):
        parts.append(f"{len(result['missing'])} planned cells were cut by the deadline.")
    return "\n\n".join(parts)


def comparison_table(result: Result) -> str:
    """Methods against tasks; what it takes to draw it is imported only for such a file."""
    from benchmarks.comparison.report import markdown

    return markdown(result)


def serving_tables(result: Result) -> str:
    """Tokens per second, the store, the trace, the promises."""
    return _serving_tables.tables(result, table, VERDICTS)


def generic_table(result: Result) -> str:
    """Any rows: what is a plain value in all of them, and the median or value of what is nested."""
    flat = [_flatten(row) for row in result["rows"]]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    return table(columns, [[_number(row.get(name)) for name in columns] for row in flat])


# The first that fits a file makes its tables.
TABLES: tuple[tuple[Callable[[Result], bool], Callable[[Result], str]], ...] = (
    (lambda result: result.get("kind") == "comparison", comparison_table),
    (lambda result: result.get("kind") == "serving", serving_tables),
    (lambda result: "ceilings" in result, gpu_tables),
    (lambda result: "loraxs_over_naive" in result["rows"][0], linear_tables),
    (lambda result: any("seconds_for_96" in row for row in result["rows"]), basis_tables),
)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows by key, keys in the order of their first appearance."""
    rows = list(rows)
    order = {value: place for place, value in enumerate(dict.fromkeys(key(row) for row in rows))}
    ordered = sorted(rows, key=lambda row: order[key(row)])
    return [(value, list(some)) for value, some in groupby(ordered, key)]


def _slashes(values: Iterable[float | None], form: str = "{:.2f}") -> str:
    return " / ".join("–" if value is None else form.format(value) for value in values)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flatten(row: Row, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{prefix}{name}": value["median_us"]} if "median_us" in value else _flatten(value, f"{name} ")
        elif not isinstance(value, list):
            found[f"{prefix}{name}"] = value
    return found
