"""The demo's report: one HTML page that needs nothing else, made from the same results as the JSON beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2430; --soft: #5b6675; --line: #dfe3e8;
  --good: #0a7f5a; --bad: #c02626; --accent: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --page: #0f141b; --card: #171e27; --ink: #e6ebf1; --soft: #9aa7b6;
  --line: #2b3542; --good: #34d399; --bad: #f87171; --accent: #60a5fa; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
.lead { color: var(--soft); font-size: 1.1rem; margin: 0 0 1.5rem; max-width: 48rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; }
.tile { padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.5rem; color: var(--accent); }
.tile span { color: var(--soft); font-size: .9rem; }
figure { margin: 0 0 1.25rem; padding: 1rem 1rem .75rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: .95rem; margin-top: .5rem; }
.card { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
tr:last-child td { border-bottom: 0; }
.text { text-align: left; }
.wrap { white-space: normal; min-width: 18rem; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
li { margin: .25rem 0; } footer { margin-top: 2.5rem; color: var(--soft); font-size: .85rem; }
"""


@dataclass(frozen=True)
class Table:
    """A table; ``text`` numbers the columns that hold words, ``wrap`` those of them that may break."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[int] = (0,)
    wrap: Sequence[int] = ()

    def html(self) -> str:
        """The table as HTML; every cell is escaped."""
        lines = ['<div class="card"><table><thead>', self._row(self.head, "th"), "</thead><tbody>"]
        return "\n".join([*lines, *(self._row(row, "td") for row in self.rows), "</tbody></table></div>"])

    def console(self) -> str:
        """The table for a terminal, columns aligned."""
        widths = [max(len(row[column]) for row in [self.head, *self.rows]) for column in range(len(self.head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column in self.text else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [self.head, *self.rows]
        ]
        return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])

    def _row(self, cells: Sequence[str], tag: str) -> str:
        def attribute(column: int) -> str:
            names = ["text"] * (column in self.text) + ["wrap"] * (column in self.wrap)
            return f' class="{" ".join(names)}"' if names else ""

        return "<tr>" + "".join(f"<{tag}{attribute(i)}>{escape(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"


@dataclass(frozen=True)
class Section:
    """A heading with figures (svg, caption in plain words), then an optional paragraph and table."""

    title: str
    figures: Sequence[tuple[str, str]] = ()
    paragraph: str = ""
    table: Table | None = None

    def html(self) -> str:
        """The section as HTML."""
        parts = [f"<h2>{escape(self.title)}</h2>"]
        if self.paragraph:
            parts.append(f"<p>{escape(self.paragraph)}</p>")
        parts += [f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in self.figures]
        if self.table:
            parts.append(self.table.html())
        return "\n".join(parts)


def page(
    title: str,
    lead: str,
    tiles: Mapping[str, str],
    checks: Mapping[str, bool],
    sections: Sequence[Section],
    footer: str,
) -> str:
    """Put the report together: title and summary, tiles (big words -> what they are), checks, sections, footer."""
    shown_tiles = "".join(
        f'<div class="tile"><b>{escape(k)}</b><span>{escape(v)}</span></div>' for k, v in tiles.items()
    )
    shown_checks = "".join(
        f'<li class="{"good" if ok else "bad"}">{"✓" if ok else "✗"} {escape(text)}</li>' for text, ok in checks.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<div class="tiles">{shown_tiles}</div>
<h2>Checked in this run</h2>
<ul style="list-style: none; padding: 0">{shown_checks}</ul>
{"".join(section.html() for section in sections)}
<footer>{escape(footer)}</footer>
</main>
</body>
</html>
"""
