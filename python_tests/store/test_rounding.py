"""What an adapter loses in fewer bits, against what theory says."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext.store import AdapterRow, RowLayout, Segment, dequantise, in_dtype, quantise

RANKS = (1, 2, 4, 16, 64)


def modules(numbers: torch.Tensor, layout: RowLayout) -> list[torch.Tensor]:
    return list(numbers.split([r * r for _, r, _ in layout.segments]))


def errors(numbers: torch.Tensor, rounded: torch.Tensor, layout: RowLayout) -> list[float]:
    """‖R' − R‖ / ‖R‖ of each module."""
    pairs = zip(modules(numbers.double(), layout), modules(rounded.double(), layout), strict=True)
    return [float((second - first).norm() / first.norm()) for first, second in pairs]


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e30], ids=str)
def test_int8_stays_within_half_a_step(scale: float) -> None:
    layout = RowLayout(Segment(f"m{i}", r) for i, r in enumerate(RANKS * 3))
    numbers = torch.randn(layout.size, generator=torch.Generator().manual_seed(0)) * scale
    quantised, steps = quantise(numbers, layout)
    assert quantised.dtype == torch.int8 and steps.dtype == torch.float32
    back = dequantise(quantised, steps, layout)
    for R, approximate, step in zip(modules(numbers, layout), modules(back, layout), steps, strict=True):
        # And the rounding of the quotient and of the product in fp32.
        assert (approximate - R).abs().max() <= step * (0.5 + 1e-4)
        assert torch.equal(step, R.abs().max() / 127)


def test_the_relative_error_of_int8_is_what_theory_says() -> None:
    layout = RowLayout(Segment(f"{r} {i}", r) for r in RANKS for i in range(50))
    numbers = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    quantised, steps = quantise(numbers, layout)
    found = errors(numbers, dequantise(quantised, steps, layout), layout)
    for r, start in zip(RANKS, range(0, 250, 50), strict=True):
        bounds, expected = [], []
        for R in modules(numbers, layout)[start : start + 50]:
            step = R.abs().max() / 127
            bounds.append(float(r * step / 2 / R.norm()))
            # The error of a number is uniform in half a step to either side; the largest number has none.
            expected.append(float((r * r - 1) ** 0.5 * step / 12**0.5 / R.norm()))
        these = found[start : start + 50]
        assert all(error <= 1.001 * bound + 1e-7 for error, bound in zip(these, bounds, strict=True))
        assert max(bounds) <= r / 254 + 1e-7
        assert sum(these) / 50 == pytest.approx(sum(expected) / 50, rel=0.15, abs=1e-7)


def test_int8_of_special_rows() -> None:
    layout = RowLayout([Segment("zero", 2), Segment("tiny", 1), Segment("one", 1)])
    numbers = torch.tensor([0.0, 0.0, 0.0, -0.0, 1e-45, -3.0])
    quantised, steps = quantise(numbers, layout)
    assert quantised.tolist() == [0, 0, 0, 0, 0, -127]
    assert steps[0] == 1 and (steps > 0).all() and steps.isfinite().all()
    back = dequantise(quantised, steps, layout)
    assert torch.equal(back[:4], torch.zeros(4)) and back[5] == pytest.approx(-3.0, rel=1e-6)
    empty, none = quantise(torch.empty(0), RowLayout([]))
    assert empty.numel() == none.numel() == 0 and dequantise(empty, none, RowLayout([])).numel() == 0


def test_quantising_twice_changes_nothing_more() -> None:
    layout = RowLayout([Segment("a", 8), Segment("b", 3)])
    row = in_dtype(AdapterRow("x", 0, layout, torch.randn(layout.size)), torch.int8)
    again = in_dtype(in_dtype(row, torch.float32), torch.int8)
    assert torch.equal(again.numbers, row.numbers)
    torch.testing.assert_close(again.steps, row.steps, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=str)
def test_half_types_round_to_nearest(dtype: torch.dtype, bound: float) -> None:
    layout = RowLayout([Segment("a", 16)])
    row = AdapterRow("x", 0, layout, torch.randn(layout.size))
    rounded = in_dtype(row, dtype)
    assert rounded.numbers.dtype == dtype and rounded.steps is None
    assert max(errors(row.numbers, rounded.numbers, layout)) <= bound
    assert in_dtype(row, torch.float32) is row
