"""Pages as a slab holds them: every owner on this machine reads them where they lie, and computes the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loraxs_ext import ops
from loraxs_ext.ops import reference

from .problems import DTYPES, SHAPES, Problem, far_apart, in_slab, make
from .test_row_scale import FORMS, make_scaling

loraxs = torch.ops.loraxs


def linear(p: Problem) -> tuple[Tensor, ...]:
    return *loraxs.linear(*p.forward_args()), *loraxs._linear(*p.forward_args())


def linear_projected(p: Problem) -> tuple[Tensor, ...]:
    low = reference.project(p.x, p.a)
    args = (p.x, p.weight, p.bias, low, p.a, p.b, p.pages, p.slots, p.scale)
    return loraxs.linear_projected(*args), loraxs._linear_projected(*args)


def add_delta(p: Problem) -> tuple[Tensor, ...]:
    y = p.dy.clone()
    loraxs.add_delta_(y, p.x, *p.low_rank_args())
    args = (p.dy, p.x, *p.low_rank_args())
    return y, *loraxs.add_delta(*args), *loraxs._add_delta(*args)


def linear_backward(p: Problem) -> tuple[Tensor, ...]:
    dx, dpages = loraxs.linear_backward(*p.backward_args(reference.linear(*p.forward_args())[1]))
    assert dpages.is_contiguous()
    return dx, dpages


OPS = [linear, linear_projected, add_delta, linear_backward]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def assert_same_bits(op: Callable[[Problem], tuple[Tensor, ...]], problem: Problem, pages: Tensor) -> None:
    expected = op(problem)
    problem.pages = pages
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(op(problem), expected, strict=True))


@each_op
@pytest.mark.parametrize("slots", [None, "mixed", "skewed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_pages_of_a_slab_give_the_same_bits(op, dtype, shape, slots):
    problem = make(SHAPES[shape], DTYPES[dtype], slots=slots)
    assert_same_bits(op, problem, in_slab(problem.pages))


@each_op
def test_pages_in_fp32_and_dropout(op):
    problem = make(SHAPES["tall"], slots="mixed", p_drop=0.0 if op is linear_projected else 0.3)
    problem = problem.to(torch.bfloat16, torch.float32)
    assert_same_bits(op, problem, in_slab(problem.pages))


@each_op
def test_pages_of_any_strides(op):
    problem = make((40, 48, 64, 6, 4), slots="mixed")
    assert_same_bits(op, problem, problem.pages.mT.contiguous().mT)
    every_other = torch.stack([problem.pages, torch.full_like(problem.pages, torch.nan)], -1)[..., 0]
    assert_same_bits(op, problem, every_other)
    problem.pages = problem.pages[:1].repeat(4, 1, 1)
    assert_same_bits(op, problem, problem.pages[:1].expand(4, 6, 6))


@each_op
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offsets_beyond_32_bits(op, dtype):
    problem = make((40, 48, 64, 16, 3), DTYPES[dtype], slots="mixed")
    assert_same_bits(op, problem, far_apart(problem.pages))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "pages"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_row_scale(dtype, pages, form):
    p = make_scaling((130, 67, 5, 4), form).to(DTYPES[dtype], DTYPES[pages])
    expected = loraxs.row_scale(*p.args())
    p.pages = in_slab(p.pages)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loraxs.row_scale(*p.args()), expected, strict=True))


@pytest.mark.skipif(not ops.backends.COMPILED, reason="the compiled ops are not built")
@pytest.mark.parametrize("op", [linear, add_delta, linear_backward], ids=lambda op: op.__name__)
def test_no_copy_is_made_of_a_slab(op):
    problem = make((4, 48, 64, 8, 50), torch.bfloat16, slots="mixed")

    def copied() -> bool:
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            op(problem)
        wanted = {"aten::clone", "aten::contiguous", "aten::copy_"}
        return any(e.name in wanted and e.input_shapes[:1] == [[50, 8, 8]] for e in profile.function_events)

    problem.pages = in_slab(problem.pages)
    assert not copied()
    problem.pages = problem.pages.mT
    assert copied()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    problem = make((6, 20, 12, 4, 3), dtype, slots="mixed", p_drop=0.3)
    problem.pages = in_slab(problem.pages)
    p = loraxs.linear(*problem.forward_args())[1]
    torch.library.opcheck(loraxs.linear_backward.default, problem.backward_args(p))
    torch.library.opcheck(loraxs.add_delta_.default, (problem.dy, problem.x, *problem.low_rank_args()))
    problem.pages.requires_grad_()
    torch.library.opcheck(loraxs.linear.default, problem.forward_args())
    torch.library.opcheck(loraxs.add_delta.default, (problem.dy, problem.x, *problem.low_rank_args()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_views_its_slab(backend):
    problem = make((6, 20, 12, 4, 3), slots="mixed")
    rows = torch.randn(3, 50)

    def layer(x: Tensor, rows: Tensor) -> Tensor:
        pages = rows[:, 7:23].view(3, 4, 4)
        return ops.linear(x, problem.weight, problem.bias, problem.a, problem.b, pages, problem.slots)

    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(
            torch.compile(layer, fullgraph=True, backend=backend)(problem.x, rows), layer(problem.x, rows)
        )


def test_gradients_reach_the_rows_of_the_slab():
    problem = make((40, 20, 12, 4, 3), slots="mixed")
    rows = torch.zeros(3, 50)
    rows[:, 7:23] = problem.pages.flatten(1)
    rows.requires_grad_(), problem.pages.requires_grad_()
    for pages in (rows[:, 7:23].view(3, 4, 4), problem.pages):
        args = (problem.x, problem.weight, problem.bias, problem.a, problem.b, pages, problem.slots)
        ops.linear(*args).backward(problem.dy)
    assert torch.equal(rows.grad[:, 7:23], problem.pages.grad.flatten(1))
    assert not rows.grad[:, :7].any() and not rows.grad[:, 23:].any()
