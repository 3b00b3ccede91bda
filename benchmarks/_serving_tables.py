"""The Markdown tables of `benchmarks/serving.py`'s result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Table = Callable[[Sequence[str], list[list[str]]], str]


def tables(result: Mapping[str, Any], table: Table, verdicts: Mapping[bool | None, str]) -> str:
    """Generation beside the base and PEFT, then the store, the attach, the trace, and what was promised.

    Args:
        result: what `benchmarks.serve.results.merge` wrote.
        table: makes Markdown of a header and lines.
        verdicts: how met, missed and not measured read.
    """
    rows = result["rows"]
    parts = []
    generation = [row for row in rows if row["section"] == "generation"]
    peers = {(row["adapters"], row["dtype"]): row for row in generation if row["provider"] == "PEFT LoRA"}
    lines = []
    for row in (row for row in generation if row["provider"] == "loraxs"):
        rate, peer = row["tokens_per_second"], peers.get((row["adapters"], row["dtype"]))
        lines.append(
            [
                f"{row['adapters']:,}",
                row["dtype"],
                f"{rate['base model']:.0f}",
                f"{rate['loraxs']:.0f}",
                f"{row['ratio']:.2f}",
                f"{row['decode_ratio']:.2f}",
                "–" if peer is None else "not run" if "not_run" in peer else f"{peer['ratio']:.2f}",
            ]
        )
    if lines:
        header = ["adapters", "dtype", "base, tokens/s", "LoRA-XS, tokens/s", "ratio", "decoding alone", "PEFT LoRA"]
        parts += [
            "`generate()`, every row of the batch its own adapter; ratios to the base model.",
            table(header, lines),
        ]
    facts = [line for row in rows for line in _facts(row)]
    if facts:
        parts.append(table(["store and trace", ""], facts))
    promised = []
    for target in result.get("targets", []):
        sign, found = "≥" if target["at_least"] else "≤", target["found"]
        promised.append(
            [
                f"{target['target']}, {sign} {target['limit']}",
                "–" if found is None else f"{found:.3g}",
                verdicts[target["met"]],
            ]
        )
    if promised:
        parts.append(table(["target", "measured", ""], promised))
    return "\n\n".join(parts)


def _facts(row: Row) -> list[list[str]]:
    """What the rows of the other sections say, a line each."""
    if row["section"] == "pack":
        found = [
            [f"{row['adapters']:,} adapters of {row['modules']} modules", f"{row['bytes'] / 1e9:.2f} GB"],
            ["an adapter", f"{row['bytes_per_adapter']:.0f} bytes, {row['over_the_numbers_alone']:.2f}× its numbers"],
        ]
        if row["adapters_per_second"] is not None:
            rate = f"{row['adapters_per_second']:,.0f} adapters/s, {row['bytes_per_second'] / 1e6:.0f} MB/s"
            found.append(["packing", rate])
        return found
    if row["section"] == "attach":
        return [["cold attach, p50 / p99", f"{row['p50_ms']:.3f} / {row['p99_ms']:.3f} ms"]]
    if row["section"] == "zipf":
        rates = row["tokens_per_second"]
        return [
            [
                f"Zipf trace, {row['adapters']:,} adapters in {row['slots']} slots, {row['requests']:,} requests",
                f"{rates['paged']:.0f} tokens/s, {row['ratio']:.3f} of all-resident",
            ],
            [
                "loads, evictions, waits, failed requests",
                f"{row['loads']:,}, {row['evictions']:,}, {row['waits']}, {row['failed_requests']}",
            ],
            [
                "already in a slot, before and after prefetch",
                f"{row['resident_before_prefetch']:.0%}, {row['resident_when_asked_for']:.0%}",
            ],
        ]
    return []
