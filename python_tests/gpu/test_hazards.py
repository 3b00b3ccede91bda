"""What batched adapter kernels have got wrong elsewhere: stale scratch, unread slots, other rows, other streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import owners
from benchmarks.gpu.check import poison_allocator

from .targets import BATCH_INVARIANT, Target, everywhere, on_gpu, same

DECODE, PREFILL = (48, 512, 384, 16, 6), (300, 512, 384, 16, 6)
regimes = pytest.mark.parametrize("shape", [DECODE, (48, 512, 384, 64, 6), PREFILL], ids=["decode", "r64", "prefill"])


def forward_and_backward(target: Target, problem) -> tuple[Tensor, ...]:
    y, p = target.linear(problem)
    return y, p, *target.op("linear_backward")(*problem.backward_args(p))


@everywhere
@regimes
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_repeatable_to_the_last_bit_whatever_memory_holds(target, shape, dtype):
    if target == Target(owners.PLAIN_TORCH, "cpu"):
        pytest.skip("BLAS may sum in another order where memory is aligned otherwise")
    problem = target.problem(shape, dtype, slots="mixed", p_drop=0.3)
    first = forward_and_backward(target, problem)
    assert all(torch.isfinite(t).all() for t in first)
    for _ in range(3):
        poison_allocator(target.device)
        assert same(forward_and_backward(target, problem), first)


@everywhere
@regimes
def test_a_row_does_not_depend_on_the_contents_of_other_rows(target, shape):
    problem = target.problem(shape, "bf16", slots="mixed")
    y, p = target.linear(problem)
    mine = torch.arange(shape[0], device=target.device) % 5 == 2
    x = torch.where(mine[:, None], problem.x, torch.randn_like(problem.x) * 100)
    # The bf16 op of the CPU takes runs of one slot through its matrix unit: there a neighbour's slot may change a bit.
    slots = torch.where(mine, problem.slots, 0) if target.on_gpu else problem.slots
    others = replace(problem, x=x, slots=slots)
    y_others, p_others = target.linear(others)
    assert same((y_others[mine], p_others[mine]), (y[mine], p[mine]))


@everywhere
def test_a_row_of_nan_stays_in_its_row(target):
    problem = target.problem(DECODE, "bf16", slots="mixed")
    y, _ = target.linear(problem)
    problem.x = problem.x.clone()
    problem.x[7] = torch.nan
    again, _ = target.linear(problem)
    assert torch.isnan(again[7]).all()
    keep = torch.arange(DECODE[0], device=target.device) != 7
    assert torch.equal(again[keep], y[keep])


@on_gpu
@pytest.mark.parametrize("sizes", [(1, 7, 33, 64, 128), (129, 300, 513)], ids=["decode", "prefill"])
@pytest.mark.parametrize("r", [16, 64])
def test_a_row_does_not_depend_on_how_many_others_there_are(target, sizes, r):
    if target.owner not in BATCH_INVARIANT:
        pytest.skip(f"{target.owner} uses torch's matmul, whose order of sums depends on the number of rows")
    problem = target.problem((max(sizes), 1024, 768, r, 4), "bf16", slots="mixed")
    y, p = target.linear(problem)
    for M in sizes:
        part = replace(problem, x=problem.x[:M], slots=problem.slots[:M])
        assert same(target.linear(part), (y[:M], p[:M])), f"first {M} rows"


@everywhere
@regimes
def test_base_rows_are_those_of_a_base_batch(target, shape):
    problem = target.problem(shape, "bf16", slots="mixed")
    base = replace(problem, slots=torch.full_like(problem.slots, -1))
    rows = problem.slots < 0
    y, alone = target.linear(problem)[0], target.linear(base)[0]
    assert rows.any() and torch.equal(y[rows], alone[rows]) and not torch.equal(y[~rows], alone[~rows])


@everywhere
def test_base_rows_read_no_page(target):
    problem = target.problem(DECODE, "bf16", slots="base")
    y, p = target.linear(problem)
    problem.pages = torch.full_like(problem.pages, torch.nan)
    assert same(target.linear(problem), (y, p))
    dx, dpages = target.op("linear_backward")(*problem.backward_args(p))
    assert torch.isfinite(dx).all() and torch.equal(dpages, torch.zeros_like(dpages))


@everywhere
def test_pages_that_no_row_names_are_not_read(target):
    problem = target.problem(DECODE, "bf16", slots="mixed")
    problem.slots = problem.slots.clamp_max(2)
    y, p = target.linear(problem)
    problem.pages = problem.pages.clone()
    problem.pages[3:] = torch.nan
    assert same(target.linear(problem), (y, p))


@everywhere
@pytest.mark.parametrize("slots", [None, "mixed"])
def test_empty_batches(target, slots):
    problem = target.problem((4, 64, 48, 8, 2), "bf16", slots=slots)
    empty = replace(
        problem, x=problem.x[:0], dy=problem.dy[:0], slots=None if problem.slots is None else problem.slots[:0]
    )
    y, p, dx, dpages = forward_and_backward(target, empty)
    assert y.shape == (0, 48) and p.shape == (0, 8) and dx.shape == (0, 64)
    assert torch.equal(dpages, torch.zeros_like(problem.pages))
    y = empty.dy.clone()
    target.op("add_delta_")(y, empty.x, *empty.low_rank_args())


@everywhere
def test_a_slot_may_be_given_away_right_after_the_call(target):
    problem = target.problem(DECODE, "bf16", slots="mixed")
    expected = target.linear(problem)
    for _ in range(3):
        pages = problem.pages.clone()
        got = target.linear(replace(problem, pages=pages))
        pages.fill_(torch.nan)
        assert same(got, expected)


@on_gpu
def test_a_slot_out_of_range_is_a_base_row(target):
    if target.owner not in (owners.TRITON, owners.TRITON_CUBLAS):
        pytest.skip(f"{target.owner} may stop the device instead, and with it this process")
    problem = target.problem(DECODE, "bf16", slots="mixed")
    rows = torch.arange(DECODE[0], device=target.device) % 3 == 0
    wild = torch.where(rows, torch.tensor(10**6, dtype=torch.int32, device=target.device), problem.slots)
    base = torch.where(rows, torch.tensor(-1, dtype=torch.int32, device=target.device), problem.slots)
    assert same(target.linear(replace(problem, slots=wild)), target.linear(replace(problem, slots=base)))


@on_gpu
@pytest.mark.parametrize("op", ["linear", "add_delta_"])
def test_more_than_two_to_the_31_numbers(target, op):
    M, K, N, r = 135_000, 16_384, 64, 4
    problem = target.problem((8, K, N, r, 2), "bf16", slots="mixed")
    x = torch.zeros(M, K, dtype=torch.bfloat16, device=target.device)
    x[-8:] = problem.x
    slots = torch.full((M,), -1, dtype=torch.int32, device=target.device)
    slots[-8:] = problem.slots
    y = torch.zeros(M, N, dtype=torch.bfloat16, device=target.device)
    if op == "linear":
        y = target.linear(replace(problem, x=x, slots=slots))[0]
        expected = target.linear(problem)[0]
    else:
        target.op(op)(y, x, problem.a, problem.b, problem.pages, slots, problem.scale, 0.0, None)
        expected = torch.zeros(8, N, dtype=torch.bfloat16, device=target.device)
        target.op(op)(expected, problem.x, *problem.low_rank_args())
    torch.testing.assert_close(y[-8:], expected, rtol=2e-2, atol=2e-2)
