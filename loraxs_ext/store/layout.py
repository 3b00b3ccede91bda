"""Which numbers of a row belong to which module: the order in which an adapter's R matrices lie end to end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

# More than any model has, and few enough to allocate for a file of unknown origin.
MAX_SEGMENTS = 1 << 16
MAX_NUMBERS = 1 << 31


class Segment(NamedTuple):
    """The R of one module.

    Attributes:
        key: name of the module in the base model.
        r: rank; r² numbers.
        scaling: s, what R is multiplied with when it is used.
    """

    key: str
    r: int
    scaling: float = 1.0


class RowLayout:
    """The modules of an adapter in the order of their numbers. Immutable; equal layouts have equal digests.

    Args:
        segments: one per module; their R matrices lie end to end, each in row-major order.

    Raises:
        ValueError: a key comes twice, or a rank or scaling is out of range.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = tuple(segments)
        if len(self.segments) > MAX_SEGMENTS:
            raise ValueError(f"segments: expected at most {MAX_SEGMENTS}, got {len(self.segments)}")
        seen: set[str] = set()
        for key, r, scaling in self.segments:
            if key in seen:
                raise ValueError(f"segments: expected every key once, got {key!r} twice")
            seen.add(key)
            if not 1 <= r <= MAX_NUMBERS:
                raise ValueError(f"segments: {key}: r: expected a positive rank, got {r}")
            if not abs(scaling) < float("inf"):
                raise ValueError(f"segments: {key}: scaling: expected a finite number, got {scaling}")
        if self.size > MAX_NUMBERS:
            raise ValueError(f"segments: expected at most {MAX_NUMBERS} numbers in a row, got {self.size}")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each segment begins, in numbers."""
        return tuple(accumulate((r * r for _, r, _ in self.segments[:-1]), initial=0)) if self.segments else ()

    @cached_property
    def size(self) -> int:
        """Numbers in a row."""
        return sum(r * r for _, r, _ in self.segments)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Key → position in `segments`."""
        return {segment.key: i for i, segment in enumerate(self.segments)}

    @cached_property
    def rank(self) -> int:
        """The largest rank; 0 for no segments."""
        return max((r for _, r, _ in self.segments), default=0)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ between layouts that differ."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).digest()

    def to_json(self) -> str:
        """The layout as text; scalings keep every bit."""
        return json.dumps([list(segment) for segment in self.segments], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> RowLayout:
        """Read what `to_json` wrote, or refuse.

        Raises:
            ValueError: the text is anything else.
        """
        try:
            entries: Any = json.loads(text)
        except RecursionError:
            raise ValueError("layout: expected a list of [key, r, scaling], got one too deep to read") from None
        if not isinstance(entries, list):
            raise ValueError(f"layout: expected a list of [key, r, scaling], got {type(entries).__name__}")
        for entry in entries:
            fits = isinstance(entry, list) and [type(part) for part in entry] in ([str, int, float], [str, int, int])
            if not fits:
                raise ValueError(f"layout: expected [key, r, scaling], got {entry!r:.100}")
        return cls(Segment(key, r, float(scaling)) for key, r, scaling in entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowLayout) and self.segments == other.segments

    def __hash__(self) -> int:
        return hash(self.segments)

    def __repr__(self) -> str:
        return f"RowLayout({len(self.segments)} modules, rank {self.rank}, {self.size} numbers)"
