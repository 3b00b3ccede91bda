"""`loraxs::add_delta` and `add_delta_` by Triton, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext.ops import reference

from ..problems import DTYPES, assert_within_twice, make

# (M, K, N, r, S)
SHAPES = {
    "one token": (1, 64, 48, 4, 1),
    "odd widths": (13, 129, 131, 5, 4),
    "rank 1": (70, 33, 17, 1, 3),
    "rank 100": (5, 70, 80, 100, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_within_twice_plain_torch(interpreted, dtype, shape):
    problem = make(SHAPES[shape], DTYPES[dtype], slots="mixed", p_drop=0.3)
    y = problem.dy.clone()
    out, p = interpreted("add_delta.add_delta", problem.dy, problem.x, *problem.low_rank_args())
    assert torch.equal(problem.dy, y)
    exact = problem.to(torch.float64)
    exact_out, exact_p = reference.add_delta(exact.dy, exact.x, *exact.low_rank_args())
    plain_out, plain_p = reference.add_delta(problem.dy, problem.x, *problem.low_rank_args())
    assert_within_twice(out, plain_out, exact_out, "out")
    assert_within_twice(p, plain_p, exact_p, "p")
    base = problem.slots < 0
    assert torch.equal(out[base], y[base])
    interpreted("add_delta.add_delta_", y, problem.x, *problem.low_rank_args())
    assert torch.equal(y, out)


@pytest.mark.parametrize("slots", [None, "base", "skewed"])
def test_slots(interpreted, slots):
    problem = make(SHAPES["odd widths"], torch.bfloat16, slots=slots)
    exact = problem.to(torch.float64)
    out, _ = interpreted("add_delta.add_delta", problem.dy, problem.x, *problem.low_rank_args())
    expected, _ = reference.add_delta(exact.dy, exact.x, *exact.low_rank_args())
    plain, _ = reference.add_delta(problem.dy, problem.x, *problem.low_rank_args())
    assert_within_twice(out, plain, expected, "out")


def test_negative_zero_and_nan_of_base_rows_stay(interpreted):
    problem = make(SHAPES["odd widths"], torch.float32, slots="base")
    y = torch.full_like(problem.dy, -0.0)
    y[3] = float("nan")
    expected = y.view(torch.int32).clone()
    out, _ = interpreted("add_delta.add_delta", y, problem.x, *problem.low_rank_args())
    assert torch.equal(out.view(torch.int32), expected)
    interpreted("add_delta.add_delta_", y, problem.x, *problem.low_rank_args())
    assert torch.equal(y.view(torch.int32), expected)


@pytest.mark.parametrize("layout", ["wide rows", "transposed", "every other column", "middle of three dimensions"])
def test_y_of_any_layout_in_place(interpreted, layout):
    problem = make((12, 40, 24, 5, 3), torch.float32, slots="mixed")
    expected, _ = interpreted("add_delta.add_delta", problem.dy, problem.x, *problem.low_rank_args())
    x = problem.x
    if layout == "wide rows":
        whole = torch.full((12, 30), 7.0)
        y = whole[:, 2:26]
    elif layout == "transposed":
        whole = torch.full((24, 12), 7.0)
        y = whole.mT
    elif layout == "every other column":
        whole = torch.full((12, 48), 7.0)
        y = whole[:, ::2]
    else:
        whole = torch.full((3, 4, 24), 7.0)
        y, x = whole.transpose(0, 1), x.reshape(4, 3, 40)
    y.copy_(problem.dy.view(y.shape))
    untouched = whole.numel() - y.numel()
    interpreted("add_delta.add_delta_", y, x, *problem.low_rank_args())
    assert torch.equal(y, expected.view(y.shape))
    assert (whole == 7.0).sum() == untouched


def test_a_row_alone_is_the_row_in_a_batch(interpreted):
    problem = make((70, 129, 40, 33, 3), torch.bfloat16, slots="mixed")
    out, _ = interpreted("add_delta.add_delta", problem.dy, problem.x, *problem.low_rank_args())
    y, x, slots = problem.dy, problem.x, problem.slots
    for rows in (slice(0, 1), slice(69, 70), slice(20, 50)):
        problem.slots = slots[rows]
        some, _ = interpreted("add_delta.add_delta", y[rows], x[rows], *problem.low_rank_args())
        assert torch.equal(some, out[rows])


def test_empty(interpreted):
    for M, N in ((0, 24), (6, 0)):
        problem = make((M, 40, max(N, 1), 5, 2), torch.float32)
        b, y = problem.b[:N], torch.ones(M, N)
        args = (problem.x, problem.a, b, problem.pages, None, 1.0)
        assert interpreted("add_delta.add_delta", y, *args)[0].shape == (M, N)
        interpreted("add_delta.add_delta_", y, *args)
