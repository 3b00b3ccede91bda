"""`loraxs::linear` by Triton, in the interpreter: decode, one pass, and the owners that leave the product to cuBLAS."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext.ops import reference

from ..problems import DTYPES, Problem, assert_within_twice, make
from .harness import launches_of

# (M, K, N, r, S). Decode with the page tile in registers, with one and with two spans of K; decode above that rank;
# one pass; ranks from 1 to 256; widths that are no multiple of anything.
DECODE = {
    "one token": (1, 64, 48, 4, 1),
    "rank 1": (7, 33, 17, 1, 3),
    "odd widths": (13, 129, 131, 5, 4),
    "two spans": (17, 1101, 40, 16, 3),
    "rank 30": (17, 1025, 40, 30, 3),
    "rank 64, two spans": (9, 1030, 40, 64, 3),
    "rank 100": (5, 70, 80, 100, 2),
    "rank 256": (2, 40, 24, 256, 2),
}
MANY = {"many tokens": (140, 96, 64, 16, 3), "many tokens, rank 20, odd": (131, 33, 67, 20, 2)}
SHAPES = DECODE | MANY


def exact_and_plain(problem: Problem) -> tuple[tuple, tuple]:
    return reference.linear(*problem.to(torch.float64).forward_args()), reference.linear(*problem.forward_args())


def check(interpreted, problem: Problem, **options) -> None:
    y, p = interpreted("linear.linear", *problem.forward_args(), **options)
    (exact_y, exact_p), (plain_y, plain_p) = exact_and_plain(problem)
    assert_within_twice(y, plain_y, exact_y, "y")
    assert_within_twice(p, plain_p, exact_p, "p")
    assert y.dtype == problem.x.dtype and p.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_within_twice_plain_torch(interpreted, dtype, shape):
    check(interpreted, make(SHAPES[shape], DTYPES[dtype], slots="mixed"))


@pytest.mark.parametrize("shape", ["odd widths", "rank 64, two spans", "many tokens"])
@pytest.mark.parametrize("slots", [None, "base", "skewed"])
def test_slots(interpreted, slots, shape):
    check(interpreted, make(SHAPES[shape], torch.bfloat16, slots=slots, bias=False))


@pytest.mark.parametrize("shape", ["odd widths", "two spans", "many tokens"])
def test_dropout(interpreted, shape):
    check(interpreted, make(SHAPES[shape], torch.bfloat16, slots="mixed", p_drop=0.3))


@pytest.mark.parametrize("shape", ["two spans", "rank 64, two spans", "many tokens"])
def test_pages_in_fp32(interpreted, shape):
    check(interpreted, make(SHAPES[shape], slots="mixed").to(torch.float16, torch.float32))


@pytest.mark.parametrize("shape", ["two spans", "rank 64, two spans", "many tokens"])
def test_a_base_row_is_the_base_model_to_the_bit(interpreted, shape):
    problem = make(SHAPES[shape], torch.bfloat16, slots="mixed")
    base = problem.slots < 0
    # What a base row must not touch: NaN pages, and an inf of its own x, which turns its p into inf or NaN.
    problem.x[base.nonzero()[0], 0] = float("inf")
    problem.pages[0] = float("nan")
    problem.slots[problem.slots == 0] = 1
    y, _ = interpreted("linear.linear", *problem.forward_args())
    problem.slots = torch.full_like(problem.slots, -1)
    expected, _ = interpreted("linear.linear", *problem.forward_args())
    assert base.any() and torch.equal(y[base].view(torch.int16), expected[base].view(torch.int16))
    assert torch.isfinite(y[~base]).all()


@pytest.mark.parametrize("shape", ["two spans", "rank 64, two spans"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_alone_is_the_row_in_a_batch(interpreted, dtype, shape):
    problem = make((36, *SHAPES[shape][1:]), DTYPES[dtype], slots="mixed")
    y, p = interpreted("linear.linear", *problem.forward_args())
    again, _ = interpreted("linear.linear", *problem.forward_args())
    assert torch.equal(y, again)
    x, slots = problem.x, problem.slots
    for rows in (slice(0, 1), slice(35, 36), slice(10, 36)):
        problem.x, problem.slots = x[rows], slots[rows]
        some_y, some_p = interpreted("linear.linear", *problem.forward_args())
        assert torch.equal(some_y, y[rows]) and torch.equal(some_p, p[rows])


def test_many_rows_do_not_depend_on_how_many(interpreted):
    problem = make((200, 70, 40, 16, 3), torch.bfloat16, slots="mixed")
    y, _ = interpreted("linear.linear", *problem.forward_args())
    problem.x, problem.slots = problem.x[60:], problem.slots[60:]
    assert torch.equal(interpreted("linear.linear", *problem.forward_args())[0], y[60:])


@pytest.mark.parametrize("shape", ["two spans", "rank 64, two spans", "many tokens"])
def test_strides(interpreted, shape):
    problem = make(SHAPES[shape], torch.float16, slots="mixed")
    expected, _ = interpreted("linear.linear", *problem.forward_args())
    for name in ("x", "weight", "a"):
        t = getattr(problem, name)
        wide = torch.full((t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype)
        wide[:, 2:-3] = t
        setattr(problem, name, wide[:, 2:-3])
    problem.b = problem.b.contiguous()
    problem.bias = torch.stack([problem.bias, problem.bias], 1)[:, 0]
    assert torch.equal(interpreted("linear.linear", *problem.forward_args())[0], expected)


@pytest.mark.parametrize("shape", ["rank 30", "rank 100", "many tokens"])
def test_linear_projected(interpreted, shape):
    problem = make(SHAPES[shape], torch.bfloat16, slots="mixed")
    args = (problem.a, problem.b, problem.pages, problem.slots, problem.scale)
    p = reference.project(problem.x, problem.a)
    stacked = torch.cat([torch.full_like(p, float("nan")), p], 1)[:, p.shape[1] :]
    y = interpreted("linear.linear_projected", problem.x, problem.weight, problem.bias, stacked, *args)
    (exact, _), (plain, _) = exact_and_plain(problem)
    assert_within_twice(y, plain, exact, "y")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_second_pass_over_a_cublas_product(interpreted, dtype):
    from loraxs_ext.ops.triton import cublas

    check(interpreted, make(SHAPES["many tokens"], DTYPES[dtype], slots="mixed", p_drop=0.3), product=cublas.expanded)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", MANY)
def test_one_cublas_product_of_concatenated_rows(interpreted, dtype, shape):
    from loraxs_ext.ops.triton import cublas

    problem = make(SHAPES[shape], DTYPES[dtype], slots="mixed")
    laid = cublas.lay_out(problem.weight, problem.b)
    assert torch.equal(laid[0], problem.weight) and torch.equal(laid[1], problem.b)
    assert cublas.is_laid_out(*laid) and not cublas.is_laid_out(problem.weight, problem.b)
    problem.weight, problem.b = laid
    check(interpreted, problem, product=cublas.concatenated)


def test_what_is_not_laid_out():
    from loraxs_ext.ops.triton import cublas

    weight, b = cublas.lay_out(torch.randn(6, 70), torch.randn(6, 5))
    other_weight, other_b = cublas.lay_out(torch.randn(6, 70), torch.randn(6, 5))
    for pair in [(weight, other_b), (weight[:, :-1], b), (weight[1:], b[:-1]), (weight, b.clone())]:
        assert not cublas.is_laid_out(*pair)
    with pytest.raises(ValueError, match=r"b: expected 6 rows of torch.float32 on cpu as weight has, got 5 rows"):
        cublas.lay_out(torch.randn(6, 70), torch.randn(5, 3))


@pytest.mark.parametrize("shape", [(0, 40, 24, 5, 2), (6, 0, 24, 5, 2), (6, 40, 0, 5, 2)], ids=["M", "K", "N"])
def test_empty_problems_launch_no_product(interpreted, shape):
    from loraxs_ext.ops.triton import linear

    M, K, N, r, S = shape
    frozen = torch.ones(N, K), torch.full((N,), 2.0), torch.ones(r, K), torch.ones(N, r)
    args = (torch.ones(M, K), *frozen, torch.ones(S, r, r))
    y, p = interpreted("linear.linear", *args, None, 1.0)
    assert y.shape == (M, N) and (y == 2.0).all() and p.shape == (M, r)
    kernels = {launch.kernel.__name__ for launch in launches_of(linear.linear, *args, None, 1.0)}
    assert kernels <= ({"_project_kernel", "_rotate_kernel"} if M and K else {"_rotate_kernel"} if M else set())


def test_launches_follow_from_shapes_alone():
    # On meta tensors reading a value fails: no launcher waits for the device or looks at slots.
    from loraxs_ext.ops.triton import linear

    def kernels(M: int, r: int, p_drop: float = 0.0) -> list[str]:
        problem = make((M, 1024, 16, r, 2), torch.bfloat16, slots="mixed", p_drop=p_drop)
        return [launch.kernel.__name__ for launch in launches_of(linear.linear, *problem.forward_args())]

    rotated = ["_project_kernel", "_rotate_kernel"]
    assert kernels(1, 16) == kernels(128, 32) == ["_decode_kernel", "_sum_kernel"]
    assert kernels(128, 33) == kernels(128, 16, 0.1) == [*rotated, "_decode_kernel", "_sum_kernel"]
    assert kernels(129, 16) == kernels(300, 256) == [*rotated, "_linear_kernel"]
