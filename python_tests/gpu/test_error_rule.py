"""Every owner, dtype and shape against fp64: at most twice the error of plain torch on the same device."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import owners
from benchmarks.gpu.check import poison_allocator
from loraxs_ext.ops import reference

from ..ops.problems import SHAPES, Problem, assert_within_twice, naive_linear
from .targets import LARGE, Target, everywhere, on_gpu

DTYPES = ["fp32", "bf16", "fp16"]
ADAPTERS = [("mixed", 0.0), (None, 0.0), ("base", 0.0), ("skewed", 0.0), ("mixed", 0.4), (None, 0.4)]


def check_forward(target: Target, problem: Problem) -> None:
    exact = problem.to(torch.float64)
    y64, p64 = reference.linear(*exact.forward_args())
    p_plain = reference.linear(*problem.forward_args())[1]
    poison_allocator(target.device)
    y, p = target.linear(problem)
    assert y.dtype == problem.x.dtype and p.dtype == p_plain.dtype
    assert_within_twice(y, naive_linear(problem), y64, "y")
    assert_within_twice(p, p_plain, p64, "p")


def check_backward(target: Target, problem: Problem) -> None:
    exact = problem.to(torch.float64)
    p64, p = (reference.linear(*each.forward_args())[1] for each in (exact, problem))
    expected = reference.linear_backward(*exact.backward_args(p64))
    plain = reference.linear_backward(*problem.backward_args(p))
    poison_allocator(target.device)
    got = target.op("linear_backward")(*problem.backward_args(p))
    for name, *three in zip(("dx", "dpages"), got, plain, expected, strict=True):
        assert_within_twice(*three, name)


def check_add_delta(target: Target, problem: Problem) -> None:
    exact = problem.to(torch.float64)
    expected, _ = reference.add_delta(exact.dy, exact.x, *exact.low_rank_args())
    plain, _ = reference.add_delta(problem.dy, problem.x, *problem.low_rank_args())
    y = problem.dy.clone()
    poison_allocator(target.device)
    target.op("add_delta_")(y, problem.x, *problem.low_rank_args())
    assert_within_twice(y, plain, expected, "y")
    if problem.slots is not None:
        base = problem.slots < 0
        assert torch.equal(y[base], problem.dy[base])


def check_rescale(target: Target, problem: Problem) -> None:
    # The magnitudes of as many slots, in the dtype of the activations; the bias is not scaled.
    g = problem.b[:, 0].expand(problem.pages.shape[0], -1).contiguous()
    args = (problem.dy, g, problem.slots, problem.bias)
    wide = tuple(t.double() if t is not None and t.is_floating_point() else t for t in args)
    poison_allocator(target.device)
    y = target.op("rescale")(*args)
    assert_within_twice(y, reference.rescale(*args), reference.rescale(*wide), "y")
    got = target.op("rescale_backward")(problem.dy, problem.dy, g, problem.slots, True)
    plain = reference.rescale_backward(problem.dy, problem.dy, g, problem.slots, True)
    exact = reference.rescale_backward(wide[0], wide[0], wide[1], problem.slots, True)
    for name, *three in zip(("dz", "dg"), got, plain, exact, strict=True):
        assert_within_twice(*three, name)


CHECKS = {
    "linear": check_forward,
    "linear_backward": check_backward,
    "add_delta_": check_add_delta,
    "rescale": check_rescale,
}
every_op = pytest.mark.parametrize("op", CHECKS)


@everywhere
@every_op
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(target, op, dtype, shape):
    CHECKS[op](target, target.problem(SHAPES[shape], dtype, slots="mixed"))


@everywhere
@every_op
@pytest.mark.parametrize(("slots", "p_drop"), ADAPTERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_slots_and_dropout(target, op, dtype, slots, p_drop):
    CHECKS[op](target, target.problem(SHAPES["tall"], dtype, slots=slots, p_drop=p_drop))


@on_gpu
@every_op
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_large_shapes(target, op, dtype, shape):
    CHECKS[op](target, target.problem(LARGE[shape], dtype, slots="mixed"))


@everywhere
@every_op
def test_half_types_take_pages_in_fp32(target, op):
    problem = target.problem(SHAPES["tall"], "bf16", slots="mixed").to(torch.bfloat16, torch.float32)
    CHECKS[op](target, problem)


@everywhere
@every_op
def test_no_bias(target, op):
    CHECKS[op](target, target.problem(SHAPES["tall"], "bf16", slots="mixed", bias=False))


@on_gpu
@pytest.mark.parametrize("op", ["linear", "linear_backward"])
def test_tf32_is_as_good_as_torchs(target, op, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    CHECKS[op](target, target.problem((256, 512, 384, 16, 3), "fp32", slots="mixed"))


@everywhere
@pytest.mark.parametrize("view", ["transposed", "every second row", "leading dimensions"])
def test_x_need_not_be_contiguous(target, view):
    problem = target.problem((24, 40, 36, 8, 3), "bf16", slots="mixed")
    y64, _ = reference.linear(*problem.to(torch.float64).forward_args())
    plain, x = naive_linear(problem), problem.x
    if view == "transposed":
        problem.x = x.T.contiguous().T
    elif view == "every second row":
        problem.x = x.repeat_interleave(2, 0)[::2]
    else:
        problem.x = x.view(2, 3, 4, 40).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    y, _ = target.linear(problem)
    assert y.shape[:-1] == problem.x.shape[:-1]
    assert_within_twice(y.reshape(24, 36), plain, y64, "y")


@everywhere
def test_b_may_have_any_layout(target):
    if target.owner == owners.CONCATENATED:
        pytest.skip("its layout is what it is about")
    problem = target.problem((24, 40, 36, 8, 3), "bf16", slots="mixed")
    problem.b, problem.weight = problem.b.contiguous(), problem.weight.T.contiguous().T
    problem.pages = problem.pages.mT.contiguous().mT
    check_forward(target, problem)
    check_backward(target, problem)
