"""p and q: the dropout mask, stacked bases, strided rows, and that a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext.ops import reference
from loraxs_ext.ops.philox import keep_mask

from ..problems import DTYPES, assert_within_twice, make

# Two spans of K, the last one ragged; an odd rank.
SHAPE = (19, 2100, 8, 21, 3)


def test_dropout_mask_is_the_contracts_to_the_bit(interpreted):
    p_drop, rng = 0.3, torch.tensor([2**40 + 11, 2**33 + 5])
    x = torch.randn(17, 45)
    p = interpreted("project.project", x, torch.eye(45), p_drop, rng)
    assert torch.equal(p != 0, keep_mask(17, 45, p_drop, rng))
    torch.testing.assert_close(p, torch.where(p != 0, x / (1 - p_drop), 0.0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("slots", [None, "mixed", "base"])
def test_p_and_q_within_twice_plain_torch(interpreted, dtype, slots):
    problem = make(SHAPE, DTYPES[dtype], slots=slots, p_drop=0.3)
    args = (problem.pages, problem.slots, problem.scale, problem.p_drop, problem.rng)
    p, q = interpreted("project.project_and_rotate", problem.x, problem.a, *args)
    results = []
    for side in (problem, problem.to(torch.float64)):
        kept = side.x * keep_mask(*side.x.shape, side.p_drop, side.rng) / (1 - side.p_drop)
        exact = reference.project(kept, side.a)
        results.append((exact, side.scale * reference._apply_pages(exact, side.pages, side.slots)))
    (plain_p, plain_q), (exact_p, exact_q) = results
    assert_within_twice(p, plain_p, exact_p, "p")
    assert_within_twice(q, plain_q, exact_q, "q")


def test_stacked_bases_give_the_projections_of_each(interpreted):
    x = torch.randn(5, 1100)
    bases = [torch.randn(r, 1100) for r in (16, 100, 33)]
    stacked = interpreted("project.project", x, torch.cat(bases))
    for base, part in zip(bases, stacked.split([16, 100, 33], dim=1), strict=True):
        assert torch.equal(part, interpreted("project.project", x, base))
        pages = torch.randn(2, *2 * [len(base)])
        q = interpreted("project.rotate", part, pages, None, 0.5)
        assert torch.equal(q, interpreted("project.rotate", part.contiguous(), pages, None, 0.5))
        torch.testing.assert_close(q, 0.5 * part @ pages[0].T, rtol=1e-4, atol=1e-3)


def test_rows_of_any_stride_are_read_in_place(interpreted):
    problem = make(SHAPE, torch.float32, slots="mixed")
    expected = interpreted("project.project", problem.x, problem.a)
    wide = torch.full((SHAPE[0], SHAPE[1] + 7), float("nan"))
    wide[:, 3:-4] = problem.x
    assert torch.equal(interpreted("project.project", wide[:, 3:-4], problem.a), expected)
    assert torch.equal(interpreted("project.project", problem.x.mT.contiguous().mT, problem.a), expected)
    lead = problem.x[:18].unflatten(0, (2, 9)).transpose(0, 1)
    rows = interpreted("project.project", lead, problem.a).unflatten(0, (9, 2)).transpose(0, 1).flatten(0, 1)
    assert torch.equal(rows, expected[:18])


def test_pages_of_any_stride(interpreted):
    problem = make((9, 48, 64, 16, 4), torch.float32, slots="mixed")
    p = problem.x @ problem.a.T
    expected = interpreted("project.rotate", p, problem.pages, problem.slots, 1.0)
    wide = torch.full((4, 20, 16), float("nan"))
    wide[:, 2:18] = problem.pages.mT
    assert torch.equal(interpreted("project.rotate", p, wide[:, 2:18].mT, problem.slots, 1.0), expected)


@pytest.mark.parametrize("r", [5, 16, 100])
def test_a_row_alone_is_the_row_in_a_batch(interpreted, r):
    problem = make((37, 1100, 8, r, 3), torch.float16, slots="mixed")
    args = (problem.a, problem.pages)
    p, q = interpreted("project.project_and_rotate", problem.x, *args, problem.slots, 0.7)
    for m in (0, 33, 36):
        row = slice(m, m + 1)
        one_p, one_q = interpreted("project.project_and_rotate", problem.x[row], *args, problem.slots[row], 0.7)
        assert torch.equal(one_p[0], p[m]) and torch.equal(one_q[0], q[m])


def test_slots_out_of_range_read_no_page(interpreted):
    problem = make((6, 40, 8, 5, 2), torch.float32)
    slots = torch.tensor([0, 1, 2, -2, 2**31 - 1, -(2**31)], dtype=torch.int32)
    _, q = interpreted("project.project_and_rotate", problem.x, problem.a, problem.pages, slots, 1.0)
    assert q[:2].abs().min() > 0 and (q[2:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 40), (6, 0)], ids=["no token", "no column"])
def test_empty(interpreted, shape):
    x, a, pages = torch.ones(shape), torch.ones(5, shape[1]), torch.ones(2, 5, 5)
    p, q = interpreted("project.project_and_rotate", x, a, pages, None, 1.0)
    assert p.shape == q.shape == (shape[0], 5) and not p.any() and not q.any()
