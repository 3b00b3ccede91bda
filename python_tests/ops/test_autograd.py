"""Gradients by every route: direct calls, eager functions, torch.compile, checkpointing, autocast."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loraxs_ext import ops

from .problems import make

SHAPE = (6, 20, 12, 4, 3)


def _leaves(problem):
    return [t.detach().clone().requires_grad_() for t in (problem.x, problem.bias, problem.pages)]


def _forward(problem, x, bias, pages):
    return ops.linear(
        x, problem.weight, bias, problem.a, problem.b, pages, problem.slots, problem.scale,
        p_drop=problem.p_drop, rng=problem.rng,
    )  # fmt: skip


@pytest.mark.parametrize("slots", [None, "mixed"])
@pytest.mark.parametrize("p_drop", [0.0, 0.3])
def test_gradcheck_linear(slots, p_drop):
    problem = make(SHAPE, torch.float64, slots=slots, p_drop=p_drop)
    assert torch.autograd.gradcheck(lambda *leaves: _forward(problem, *leaves), _leaves(problem))


@pytest.mark.parametrize("p_drop", [0.0, 0.3])
def test_gradcheck_add_delta(p_drop):
    problem = make(SHAPE, torch.float64, slots="mixed", p_drop=p_drop)
    x, _, pages = _leaves(problem)
    y = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)

    def delta(y, x, pages):
        return ops.add_delta(
            y, x, problem.a, problem.b, pages, problem.slots, problem.scale, p_drop=p_drop, rng=problem.rng
        )

    assert torch.autograd.gradcheck(delta, (y, x, pages))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["linear", "add_delta", "add_delta_"])
def test_opcheck(op, dtype):
    problem = make(SHAPE, dtype, slots="mixed", p_drop=0.3)
    low_rank = problem.low_rank_args()
    if op == "linear":
        args = problem.forward_args()
        args[0].requires_grad_(), args[5].requires_grad_()
    else:
        args = (problem.dy, problem.x, *low_rank)
        if op == "add_delta":
            args[0].requires_grad_(), args[4].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.loraxs, op).default, args)


def test_opcheck_backward():
    problem = make(SHAPE, slots="mixed")
    p = torch.ops.loraxs.linear(*problem.forward_args())[1]
    torch.library.opcheck(torch.ops.loraxs.linear_backward.default, problem.backward_args(p))


def test_direct_call_and_public_function_differentiate_alike():
    problem = make(SHAPE, slots="mixed", p_drop=0.3)
    grads = []
    for route in (lambda *leaves: _forward(problem, *leaves), None):
        x, bias, pages = _leaves(problem)
        if route is None:
            args = (x, problem.weight, bias, problem.a, problem.b, pages, *problem.low_rank_args()[3:])
            y = torch.ops.loraxs.linear(*args)[0]
        else:
            y = route(x, bias, pages)
        y.backward(problem.dy)
        grads.append((x.grad, bias.grad, pages.grad))
    assert all(torch.equal(s, t) for s, t in zip(*grads, strict=True))


def test_compiled_forward_and_backward_equal_eager():
    problem = make((32, 48, 40, 8, 3), slots="mixed", p_drop=0.3)

    def loss(x, bias, pages):
        return (torch.tanh(_forward(problem, x, bias, pages)) * problem.dy).sum()

    eager, compiled = _leaves(problem), _leaves(problem)
    expected = loss(*eager)
    expected.backward()
    got = torch.compile(loss, fullgraph=True)(*compiled)
    got.backward()
    torch.testing.assert_close(got, expected)
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c.grad, e.grad)


def test_checkpointing_recomputes_the_same_mask():
    problem = make(SHAPE, p_drop=0.5)

    def step(x, bias, pages):
        rng = torch.randint(2**62, (2,))
        return ops.linear(x, problem.weight, bias, problem.a, problem.b, pages, p_drop=0.5, rng=rng)

    grads = []
    for run in (step, lambda *leaves: checkpoint(step, *leaves, use_reentrant=False)):
        torch.manual_seed(5)
        leaves = _leaves(problem)
        run(*leaves).backward(problem.dy)
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(s, t) for s, t in zip(*grads, strict=True))


def test_frozen_tensors_that_require_grad_are_refused():
    problem = make(SHAPE)
    problem.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: expected a frozen tensor"):
        _forward(problem, *_leaves(problem))


def test_autocast_casts_like_torch():
    problem = make((32, 48, 40, 8, 1))
    x, bias, pages = _leaves(problem)
    with torch.autocast("cpu", torch.bfloat16):
        y = _forward(problem, x, bias, pages)
    half = make((32, 48, 40, 8, 1)).to(torch.bfloat16, torch.float32)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, _forward(half, half.x, half.bias, half.pages))
    y.float().pow(2).sum().backward()
    assert x.grad.dtype == torch.float32 and pages.grad.dtype == torch.float32


def test_only_what_is_needed_is_saved():
    problem = make((64, 48, 40, 8, 1), slots=None, p_drop=0.3)
    x, bias, pages = _leaves(problem)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _forward(problem, x, bias, pages)
    frozen = {t.data_ptr() for t in (problem.weight, problem.a, problem.b, problem.rng, pages)}
    extra = [t for t in saved if t.data_ptr() not in frozen]
    assert [tuple(t.shape) for t in extra] == [(64, 8)]
