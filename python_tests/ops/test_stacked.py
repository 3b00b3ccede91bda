"""One projection for several layers of one x: the ops `project` and `linear_projected`, and `linear_stack` of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraxs_ext import ops
from loraxs_ext.ops import reference

from .problems import DTYPES, SHAPES, Problem, assert_within_twice, make, naive_linear

SHAPE = (6, 20, 12, 4, 3)


def projected(p: Problem, share: torch.Tensor) -> tuple:
    return p.x, p.weight, p.bias, share, p.a, p.b, p.pages, p.slots, p.scale


def stack_of_three(dtype: torch.dtype = torch.float64) -> tuple[list[Problem], torch.Tensor]:
    """Three problems with one x, of several ranks and widths, and their bases one below the other."""
    sizes = [(4, 12), (3, 12), (5, 8)]
    problems = [
        make((6, 20, N, r, 3), dtype, slots="mixed", bias=N == 12, seed=seed) for seed, (r, N) in enumerate(sizes)
    ]
    problems = [replace(problem, x=problems[0].x) for problem in problems]
    return problems, torch.cat([problem.a for problem in problems])


def sites(problems: list[Problem]) -> list[ops.Site]:
    return [ops.Site(p.weight, p.bias, p.a, p.b, p.pages, p.slots, p.scale) for p in problems]


@pytest.mark.parametrize("slots", [None, "mixed", "base"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_error_within_twice_plain_torch(dtype, shape, slots):
    problem = make(SHAPES[shape], DTYPES[dtype], slots=slots)
    exact = problem.to(torch.float64)
    y64, p64 = reference.linear(*exact.forward_args())
    p = ops.project(problem.x, problem.a)
    assert_within_twice(p, reference.linear(*problem.forward_args())[1], p64, "p")
    y = ops.linear_projected(*projected(problem, p))
    assert y.dtype == problem.x.dtype
    assert_within_twice(y, naive_linear(problem), y64, "y")


def test_a_stack_is_its_layers_to_the_last_bit_of_the_same_ops():
    problems, a = stack_of_three()
    together = ops.linear_stack(problems[0].x, a, sites(problems))
    for y, problem in zip(together, problems, strict=True):
        alone = torch.ops.loraxs.linear(*problem.forward_args())[0]
        torch.testing.assert_close(y, alone, rtol=1e-13, atol=1e-13)
    shares = ops.project(problems[0].x, a).split([4, 3, 5], dim=1)
    for y, problem, p in zip(together, problems, shares, strict=True):
        assert torch.equal(y, ops.linear_projected(*projected(problem, p)))


def test_gradients_of_a_stack_are_those_of_its_layers():
    problems, a = stack_of_three()
    found = []
    for stacked in (True, False):
        x = problems[0].x.clone().requires_grad_()
        leaves = [
            (p.pages.clone().requires_grad_(), None if p.bias is None else p.bias.clone().requires_grad_())
            for p in problems
        ]
        each = [replace(p, x=x, pages=pages, bias=bias) for p, (pages, bias) in zip(problems, leaves, strict=True)]
        if stacked:
            ys = ops.linear_stack(x, a, sites(each))
        else:
            ys = [ops.linear(p.x, p.weight, p.bias, p.a, p.b, p.pages, p.slots, p.scale) for p in each]
        wanted = [x, *(t for pair in leaves for t in pair if t is not None)]
        found.append(torch.autograd.grad(sum(y.square().sum() for y in ys), wanted))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck_with_p_as_a_function_of_x():
    problem = make(SHAPE, torch.float64, slots="mixed")

    def linear(x, bias, pages):
        p = ops.project(x, problem.a)
        return ops.linear_projected(x, problem.weight, bias, p, problem.a, problem.b, pages, problem.slots, 0.7)

    leaves = [t.detach().clone().requires_grad_() for t in (problem.x, problem.bias, problem.pages)]
    assert torch.autograd.gradcheck(linear, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    problem = make(SHAPE, dtype, slots="mixed")
    p = ops.project(problem.x, problem.a)
    torch.library.opcheck(torch.ops.loraxs.project.default, (problem.x, problem.a))
    arguments = projected(problem, p)
    arguments[0].requires_grad_(), arguments[6].requires_grad_()
    torch.library.opcheck(torch.ops.loraxs.linear_projected.default, arguments)


def test_compiled_with_gradients():
    problem = make(SHAPE, slots="mixed")
    x, pages = (t.clone().requires_grad_() for t in (problem.x, problem.pages))

    def loss(x, pages):
        p = ops.project(x, problem.a)
        return (
            ops.linear_projected(x, problem.weight, None, p, problem.a, problem.b, pages, problem.slots).square().sum()
        )

    expected = torch.autograd.grad(loss(x, pages), (x, pages))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, pages), (x, pages))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_p_is_saved_for_backward():
    problem = make((32, 64, 48, 4, 3), slots="mixed")
    pages = problem.pages.requires_grad_()
    p = ops.project(problem.x, problem.a)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear_projected(*projected(problem, p)[:6], pages, problem.slots, problem.scale)
    frozen = {t.data_ptr() for t in (problem.weight, problem.a, problem.b, pages, problem.slots)}
    assert [t.shape for t in saved if t.data_ptr() not in frozen] == [(32, 4)]


def test_autocast_casts_both_halves():
    problem = make((16, 64, 48, 4, 3), slots="mixed")
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = ops.linear_stack(problem.x, problem.a, sites([problem]))
        alone = ops.linear(problem.x, problem.weight, problem.bias, *problem.low_rank_args()[:5])
    assert y.dtype == alone.dtype == torch.bfloat16
    torch.testing.assert_close(y, alone, rtol=2e-2, atol=2e-2)


def test_a_trained_basis_is_refused():
    problem = make(SHAPE)
    p = ops.project(problem.x, problem.a)
    for name in ("weight", "a", "b"):
        changed = replace(problem, **{name: getattr(problem, name).clone().requires_grad_()})
        with pytest.raises(ValueError, match=f"linear_projected: {name}: expected a frozen tensor"):
            ops.linear_projected(*projected(changed, p))


def test_differentiating_twice_is_refused():
    problem = make(SHAPE)
    x = problem.x.requires_grad_()
    y = ops.linear_projected(*projected(problem, ops.project(x, problem.a)))
    with pytest.raises(RuntimeError, match="linear_projected: differentiating twice"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_ranks_that_do_not_fit_the_stack_are_refused():
    problems, a = stack_of_three()
    with pytest.raises(ValueError, match=r"linear_stack: a: expected 12 rows for ranks \[4, 3, 5\], got 11"):
        ops.linear_stack(problems[0].x, a[:-1], sites(problems))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": torch.zeros(6, 5)}, r"p: expected shape \[M=6, r=4\], got \[6, 5\]"),
        ({"p": torch.zeros(6, 4, dtype=torch.bfloat16)}, "p: expected dtype torch.float32"),
        ({"slots": torch.full((6,), 3, dtype=torch.int32)}, r"slots: expected values in \[-1, 3\), got 3"),
    ],
)
def test_bad_input_is_named(change, message):
    problem = make(SHAPE, slots="mixed")
    arguments = dict(
        zip(
            ("x", "weight", "bias", "p", "a", "b", "pages", "slots", "scale"),
            projected(problem, torch.zeros(6, 4)),
            strict=True,
        )
    )
    with pytest.raises(ValueError, match=message):
        ops.linear_projected(**{**arguments, **change})


@pytest.mark.parametrize("shape", [(0, 8, 6, 2, 2), (3, 0, 6, 2, 2), (3, 8, 0, 2, 2)], ids=["M=0", "K=0", "N=0"])
def test_empty_problems(shape):
    M, K, N, r, S = shape
    x, a = torch.zeros(M, K), torch.zeros(r, K)
    p = ops.project(x, a)
    assert torch.equal(p, torch.zeros(M, r))
    y = ops.linear_projected(x, torch.zeros(N, K), None, p, a, torch.zeros(N, r), torch.zeros(S, r, r))
    assert y.shape == (M, N)
