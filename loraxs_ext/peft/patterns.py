"""Regular expressions of others: how long could they take?"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

# What Python makes of an expression has had this form since 1.6; only the modules have been renamed.
_PARSER, _CODES = ("re._parser", "re._constants") if sys.version_info >= (3, 11) else ("sre_parse", "sre_constants")
parser, code = import_module(_PARSER), import_module(_CODES)

# Letters of a long name of a module.
_NAME = 128
# Ways to match one name: that many take a second, and for a name of half the length, a thirtieth of it.
_WAYS = 1e8
# Ways to match all names of a file: that many take half a minute.
_WAYS_OF_ALL = 2e9
# As PEFT looks up a rank or alpha.
_LOOK_UP = r"(.*\.)?({})$"
_REPEATS = {code.MAX_REPEAT, code.MIN_REPEAT, getattr(code, "POSSESSIVE_REPEAT", None)}
_ONE_WAY = {code.LITERAL, code.NOT_LITERAL, code.ANY, code.IN, code.AT, code.GROUPREF}


class _Ways(NamedTuple):
    """Bounds how many ways an expression can match from one place: `fixed` · (lengths + `open` choose `open`)."""

    fixed: float
    open: int

    def bound(self, length: int) -> float:
        return self.fixed * math.comb(length + self.open, self.open)


def check_patterns(fields: Mapping[str, Any], names: Collection[str] | None = None) -> None:
    """Refuse regular expressions that PEFT could spend minutes on, or for ever, as `(a+)+$`.

    Python tries all ways to match; their number is bounded before anything is matched. Repeats within repeats, and long
    rows of `.*` or of alternatives, go beyond any limit; names, and alternatives and some `.*` between them, don't.

    Args:
        fields: of a configuration, or of its file.
        names: that will be looked up; None for one of usual length.

    Raises:
        ValueError: a pattern is none, or could take too long; the message names it.
    """
    length, times, limit = (_NAME, 1, _WAYS) if names is None else (max(map(len, names)), len(names), _WAYS_OF_ALL)
    total = 0.0
    for field, pattern, expression in _patterns(fields):
        try:
            re.compile(pattern)
            ways = _sequence(parser.parse(expression)).bound(length) * times
        except (re.error, RecursionError, OverflowError) as reason:
            raise ValueError(f"{field}: expected a regular expression, got {pattern!r:.100}: {reason}") from None
        total += ways
        if total > limit:
            which = "which" if ways > limit else "which, with those before,"
            raise ValueError(
                f"{field}: expected patterns that are matched in reasonable time, got {pattern!r:.100}, {which} may be "
                f"tried in {total:.0e} ways"
            )


def _patterns(fields: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Field, pattern, and the expression that PEFT makes of it; what has another type is refused elsewhere."""
    for field in ("rank_pattern", "alpha_pattern"):
        values = fields.get(field)
        for pattern in values if isinstance(values, dict) else ():
            yield field, pattern, _LOOK_UP.format(pattern)
    for field in ("target_modules", "exclude_modules", "target_parameters"):
        # As a list, they are names.
        if isinstance(fields.get(field), str):
            yield field, fields[field], fields[field]
    for field in ("layers_pattern", "modules_to_save"):
        values = fields.get(field) or ()
        for pattern in [values] if isinstance(values, str) else values if isinstance(values, list) else ():
            if isinstance(pattern, str):
                yield field, pattern, rf".*(?:{pattern}).*"


def _sequence(items: Any) -> _Ways:
    ways = [_item(kind, argument) for kind, argument in items]
    return _Ways(math.prod(way.fixed for way in ways), sum(way.open for way in ways))


def _item(kind: Any, argument: Any) -> _Ways:
    if kind in _ONE_WAY:
        return _Ways(1, 0)
    if kind is code.SUBPATTERN:
        return _sequence(argument[-1])
    if kind in (code.ASSERT, code.ASSERT_NOT):
        return _sequence(argument[1])
    if kind is code.BRANCH:
        return _alternatives(argument[1])
    if kind in _REPEATS:
        return _repeat(*argument)
    return _Ways(math.inf, 0)


def _alternatives(branches: list[Any]) -> _Ways:
    texts = [tuple(argument if kind is code.LITERAL else None for kind, argument in branch) for branch in branches]
    ordered = sorted(texts) if all(None not in text for text in texts) else []
    # Of names none of which begins another, one at most is there.
    if ordered and all(b[: len(a)] != a for a, b in zip(ordered, ordered[1:], strict=False)):
        return _Ways(1, 0)
    ways = [_sequence(branch) for branch in branches]
    return _Ways(sum(way.fixed for way in ways), max(way.open for way in ways))


def _repeat(least: int, most: int, body: Any) -> _Ways:
    once = _sequence(body)
    if most <= 1:
        return _Ways(once.fixed + (least == 0), once.open)
    narrowest, _ = body.getwidth()
    if narrowest == 0 or once != (1, 0):
        return _Ways(math.inf, 0)
    return _Ways(1, 0) if least == most else _Ways(1, 1)
