"""Pages as a slab holds them, in the interpreter: read where they lie, at 64-bit offsets, with the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference

from ..problems import Problem, far_apart, in_slab, make
from ..test_row_scale import FORMS, make_scaling

# (M, K, N, r, S): decode with R applied in place and by a kernel of its own, and many tokens.
SHAPES = {
    "decode": (9, 129, 40, 16, 3),
    "decode, rank 40": (9, 70, 40, 40, 3),
    "many tokens": (131, 33, 40, 5, 3),
}
CALLS = {
    "linear.linear": Problem.forward_args,
    "add_delta.add_delta": lambda p: (p.dy, p.x, *p.low_rank_args()),
    "linear_backward.linear_backward": lambda p: p.backward_args(reference.project(p.x, p.a)),
}


def assert_same_bits(interpreted, call: str, shape: str, place: Callable[[Tensor], Tensor]) -> None:
    problem = make(SHAPES[shape], torch.float16, slots="mixed")
    expected = interpreted(call, *CALLS[call](problem))
    problem.pages = place(problem.pages)
    got = interpreted(call, *CALLS[call](problem))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
def test_pages_of_a_slab_give_the_same_bits(interpreted, call, shape):
    assert_same_bits(interpreted, call, shape, in_slab)


# Both kernels that read pages.
@pytest.mark.parametrize("shape", ["decode", "decode, rank 40"])
def test_offsets_beyond_32_bits(interpreted, shape):
    assert_same_bits(interpreted, "linear.linear", shape, far_apart)


@pytest.mark.parametrize("form", FORMS)
def test_row_scale(interpreted, form):
    p = make_scaling((40, 67, 5, 4), form).to(torch.float32)
    expected = interpreted("row_scale.row_scale", *p.args())
    p.pages = in_slab(p.pages)
    got = interpreted("row_scale.row_scale", *p.args())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
