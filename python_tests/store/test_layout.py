"""Rows: the order of their numbers, and layouts that come from a file."""

from __future__ import annotations

import pytest

from loraxs_ext.store import RowLayout, Segment

LAYOUT = RowLayout([Segment("q", 4, 2.0), Segment("k", 2, 1 / 3), Segment("v", 4)])


def test_segments_lie_end_to_end():
    assert LAYOUT.offsets == (0, 16, 20)
    assert (LAYOUT.size, LAYOUT.rank, LAYOUT.index["v"]) == (36, 4, 2)


def test_a_layout_survives_its_text():
    assert RowLayout.from_json(LAYOUT.to_json()) == LAYOUT
    assert RowLayout.from_json(LAYOUT.to_json()).digest == LAYOUT.digest


def test_another_scaling_is_another_layout():
    other = RowLayout([*LAYOUT.segments[:2], Segment("v", 4, 0.5)])
    assert other != LAYOUT and other.digest != LAYOUT.digest


def test_no_modules():
    assert (RowLayout([]).offsets, RowLayout([]).size, RowLayout([]).rank) == ((), 0, 0)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment("q", 4), Segment("q", 2)], "got 'q' twice"),
        ([Segment("q", 0)], "q: r: expected a positive rank, got 0"),
        ([Segment("q", 4, float("nan"))], "q: scaling: expected a finite number, got nan"),
        ([Segment("q", 1 << 16)], "at most 2147483648 numbers in a row, got 4294967296"),
    ],
)
def test_impossible_layouts_are_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        RowLayout(segments)


@pytest.mark.parametrize("text", ["{}", '["q"]', '[["q", "4", 1.0]]', '[["q", true, 1.0]]', "[", '[["q", 4]]'])
def test_text_of_unknown_origin(text):
    with pytest.raises(ValueError):
        RowLayout.from_json(text)
