"""Rows of every kind in a slab, to the last bit as a loop over the modules would write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraxs_ext.store import AdapterRow, RowLayout, Segment, Slab

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

SLAB = RowLayout([Segment("q", 4), Segment("k", 2), Segment("v", 5), Segment("o", 1), Segment("up", 4)])
LAYOUTS = {
    "the slab's": SLAB,
    "with scalings": RowLayout([Segment(key, r, 1 / 3 + i) for i, (key, r, _) in enumerate(SLAB.segments)]),
    "one scaling": RowLayout([Segment(key, r, 0.5 if key == "v" else 1.0) for key, r, _ in SLAB.segments]),
    "smaller ranks": RowLayout([Segment("q", 3), Segment("k", 2), Segment("v", 2), Segment("o", 1), Segment("up", 1)]),
    "fewer modules": RowLayout([Segment("q", 4), Segment("v", 5)]),
    "another order": RowLayout(SLAB.segments[::-1]),
    "all at once": RowLayout([Segment("up", 3, 2.7), Segment("q", 1, 0.1), Segment("v", 5)]),
    "no modules": RowLayout([]),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def make_row(layout: RowLayout, dtype: torch.dtype, seed: int = 0) -> AdapterRow:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.int8:
        numbers = torch.randint(-127, 128, (layout.size,), generator=generator, dtype=torch.int8)
        steps = torch.rand(len(layout.segments), generator=generator) + 0.01
        return AdapterRow("alice", 1, layout, numbers, steps)
    return AdapterRow("alice", 1, layout, torch.randn(layout.size, generator=generator).to(dtype))


def written(row: AdapterRow, layout: RowLayout, dtype: torch.dtype) -> Tensor:
    """The reference: one module after the other, in fp32, rounded once."""
    out = torch.zeros(layout.size, dtype=dtype)
    for i, (key, r, scaling) in enumerate(row.layout.segments):
        begin = row.layout.offsets[i]
        R = row.numbers[begin : begin + r * r].reshape(r, r).float()
        if row.steps is not None:
            R = R * row.steps[i]
        j = layout.index[key]
        rank, place = layout.segments[j].r, layout.offsets[j]
        page = out[place : place + rank * rank].view(rank, rank)
        page[:r, :r] = R * scaling
    return out


def poisoned(slots: int, dtype: torch.dtype) -> Slab:
    slab = Slab(SLAB, slots, dtype)
    slab.rows.fill_(torch.nan)
    return slab


@dtypes
@layouts
@pytest.mark.parametrize("source", [*DTYPES.values(), torch.int8], ids=[*DTYPES, "int8"])
def test_a_row_as_the_loop_writes_it(layout, source, dtype):
    row = make_row(layout, source)
    slab = poisoned(3, dtype)
    slab.write(1, row)
    assert torch.equal(slab.rows[1], written(row, SLAB, dtype))
    assert slab.rows[[0, 2]].isnan().all()


@dtypes
def test_many_rows_of_many_kinds(dtype):
    kinds = [*DTYPES.values(), torch.int8]
    rows = [
        make_row(layout, kind, seed)
        for seed, (layout, kind) in enumerate(zip(LAYOUTS.values(), 2 * kinds, strict=True))
    ]
    slots = [6, 0, 3, 9, 1, 4, 8, 2]
    slab = poisoned(10, dtype)
    slab.write_many(slots, iter(rows))
    for slot, row in zip(slots, rows, strict=True):
        assert torch.equal(slab.rows[slot], written(row, SLAB, dtype))
    assert slab.rows[[5, 7]].isnan().all()


def test_a_row_may_be_overwritten_when_the_next_is_asked_for():
    buffer = torch.empty(SLAB.size)

    def rows():
        for number in range(3):
            buffer.fill_(number)
            yield AdapterRow(f"adapter {number}", 1, SLAB, buffer)

    slab = Slab(SLAB, 3)
    slab.write_many([2, 1, 0], rows())
    assert [slab.rows[slot].unique().tolist() for slot in range(3)] == [[2], [1], [0]]


def test_pages_are_views_of_the_rows():
    slab = Slab(SLAB, 3)
    row = make_row(SLAB, torch.float32)
    slab.write(2, row)
    pages = slab.pages("v")
    assert pages.shape == (3, 5, 5) and pages.stride() == (SLAB.size, 5, 1)
    assert torch.equal(pages[2].flatten(), row.numbers[SLAB.offsets[2] :][:25])
    pages[0] = 7
    assert slab.rows[0].sum() == 7 * 25
    assert pages.untyped_storage().data_ptr() == slab.rows.untyped_storage().data_ptr()


def test_padded_pages_compute_the_smaller_adapter():
    # y = x Aᵀ Rᵀ Bᵀ with the first r singular vectors is the same as with all of them and R padded.
    torch.manual_seed(0)
    slab = Slab(RowLayout([Segment("q", 5)]), 1, torch.float32)
    R, a, b, x = torch.randn(3, 3), torch.randn(5, 8), torch.randn(6, 5), torch.randn(2, 8)
    slab.write(0, AdapterRow("alice", 1, RowLayout([Segment("q", 3, 0.5)]), R.flatten()))
    alone = 0.5 * (x @ a[:3].T) @ R.T @ b[:, :3].T
    torch.testing.assert_close((x @ a.T) @ slab.pages("q")[0].T @ b.T, alone)


def test_memory_and_layout():
    slab = Slab(LAYOUTS["with scalings"], 10, torch.bfloat16)
    assert slab.nbytes == 10 * SLAB.size * 2
    assert slab.layout == SLAB  # scalings are of adapters, not of the slab
    assert (slab.slots, slab.dtype, slab.device) == (10, torch.bfloat16, torch.device("cpu"))
    assert not slab.rows.any()


def test_no_more_plans_are_kept_than_needed():
    slab = Slab(SLAB, 1)
    for number in range(200):
        row = make_row(RowLayout([Segment("q", 2, 1.0 + number)]), torch.float32)
        slab.write(0, row)
        assert torch.equal(slab.rows[0], written(row, SLAB, torch.float32))
    assert len(slab._plans) == 64


def test_one_made_in_inference_mode_can_be_written_outside_of_it():
    row = make_row(LAYOUTS["all at once"], torch.float32)
    with torch.inference_mode():
        slab = Slab(SLAB, 2)
        slab.write(0, row)
    slab.write(1, row)
    assert torch.equal(slab.rows[0], slab.rows[1])


def test_a_trained_row_leaves_no_graph():
    slab = Slab(SLAB, 1)
    for layout in (SLAB, LAYOUTS["all at once"]):
        slab.write(0, AdapterRow("alice", 1, layout, torch.ones(layout.size, requires_grad=True)))
    assert not slab.rows.requires_grad


ROW = make_row(SLAB, torch.float32)
INT8 = make_row(SLAB, torch.int8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row(RowLayout([Segment("q", 2), Segment("x", 1), Segment("y", 1)]), torch.float32),
         "'alice': expected modules among the slab's 5, got 2 others of 3, the first 'x'"),
        (make_row(RowLayout([Segment("q", 2), Segment("k", 3)]), torch.float32), "k: expected rank 2 or less, got 3"),
        (ROW._replace(numbers=ROW.numbers[1:]), r"expected 62 numbers, got \(61,\)"),
        (ROW._replace(numbers=ROW.numbers[None]), r"expected 62 numbers, got \(1, 62\)"),
        (ROW._replace(numbers=ROW.numbers.double()), "expected fp32, fp16, bf16 or int8, got torch.float64"),
        (ROW._replace(steps=INT8.steps), "expected steps for int8 only, got them for torch.float32"),
        (INT8._replace(steps=None), "expected fp32 steps of 5 modules for int8, got none"),
        (INT8._replace(steps=torch.ones(4)), r"expected fp32 steps of 5 modules for int8, got torch.float32 \(4,\)"),
        (INT8._replace(steps=torch.ones(5).double()), r"expected fp32 steps of 5 modules for int8, got torch.float64"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_leave_the_slot_alone(row, message):
    slab = Slab(SLAB, 1)
    slab.write(0, ROW)
    with pytest.raises(ValueError, match=message):
        slab.write(0, row)
    assert torch.equal(slab.rows[0], ROW.numbers)


@pytest.mark.parametrize("scaling", [1.0, 1e4])
@pytest.mark.parametrize("keys", [5, 2], ids=["whole", "part"])
def test_numbers_beyond_the_range_are_refused_not_rounded_to_infinity(scaling, keys):
    layout = RowLayout(segment._replace(scaling=scaling) for segment in SLAB.segments[:keys])
    row = make_row(layout, torch.float32)
    row = row._replace(numbers=torch.full_like(row.numbers, 7e4 / scaling))
    slab = Slab(SLAB, 1, torch.float16)
    with pytest.raises(ValueError, match="'alice': expected s·R in the range of torch.float16"):
        slab.write(0, row)
    assert not slab.rows.any()
    slab = Slab(SLAB, 1, torch.bfloat16)
    slab.write(0, row)
    assert slab.rows.any()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Slab(SLAB, 0), "slots: expected at least 1, got 0"),
        (lambda: Slab(SLAB, 1, torch.int8), "dtype: expected one of .*, got torch.int8"),
        (lambda: Slab(SLAB, 2).write(2, ROW), "slots: expected 0 to 1, got 2"),
        (lambda: Slab(SLAB, 2).write(-1, ROW), "slots: expected 0 to 1, got -1"),
        (lambda: Slab(SLAB, 2).write_many([0, 1], [ROW]), "shorter"),
    ],
)
def test_misuse(action, message):
    with pytest.raises(ValueError, match=message):
        action()


def test_a_module_that_is_not_there():
    with pytest.raises(KeyError, match="no module 'gate'"):
        Slab(SLAB, 1).pages("gate")
