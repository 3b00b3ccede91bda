"""The source of the CUDA linear for few tokens, run on the CPU by the shim of csrc/testing: arithmetic and addresses.

Under AddressSanitizer, with buffers of exactly the right size; outputs, scratch and shared memory start as NaN. What no
shim shows: speed, races, and what tensor cores round inside one product.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference

from .problems import DTYPES, Problem, assert_within_twice, in_slab, make, naive_linear
from .simt import build


class Plan(NamedTuple):
    two_kernels: bool
    cluster: bool
    bulk: bool
    splits: int


# Per kernel: compute capability, (M, K, N, r, S), and what the plan has to choose.
CASES = {
    "global parts, one token": (8, (1, 520, 130, 4, 3), Plan(False, False, False, 2)),
    "one part, rank 1": (8, (3, 40, 17, 1, 2), Plan(False, False, False, 1)),
    "global parts, rank 3": (8, (13, 1032, 33, 3, 4), Plan(False, False, False, 4)),
    "global parts, 21 tokens": (8, (21, 264, 140, 16, 2), Plan(False, False, False, 2)),
    "global parts, 61 tokens": (8, (61, 264, 72, 16, 3), Plan(False, False, False, 2)),
    "global parts, rank 21": (8, (9, 280, 40, 21, 2), Plan(False, False, False, 2)),
    "sm_90 without bulk copies": (9, (5, 264, 40, 16, 2), Plan(False, False, False, 2)),
    "bulk, 5 tokens": (9, (5, 6400, 24, 16, 7), Plan(False, True, True, 8)),  # the ring of stages goes round
    "bulk, 11 tokens": (9, (11, 768, 130, 7, 2), Plan(False, True, True, 2)),
    "bulk, rank 32": (9, (16, 512, 72, 32, 2), Plan(False, True, True, 2)),
    "cluster, 30 tokens": (9, (30, 512, 132, 16, 4), Plan(False, True, False, 2)),
    "cluster, 50 tokens": (10, (50, 280, 65, 8, 2), Plan(False, True, False, 2)),
    "two kernels, 7 tokens": (9, (7, 776, 130, 128, 3), Plan(True, True, False, 4)),
    "two kernels, 33 tokens": (9, (33, 264, 72, 24, 2), Plan(True, True, False, 2)),
    "two kernels, 70 tokens": (9, (70, 264, 36, 9, 3), Plan(True, True, False, 2)),
}
KERNELS = ["global parts, 21 tokens", "bulk, 5 tokens", "cluster, 50 tokens", "two kernels, 33 tokens"]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("simt") / "linear_decode"
    return build("linear_decode_simt.cpp", output, "-fsanitize=address,undefined")


def run(program: Path, capability: int, p: Problem, order: bool = False) -> tuple[Plan, Tensor, Tensor]:
    """The plan, y and p of one call; `order` turns around what the hardware may do in any order."""
    M, K, N, r = *p.x.shape, p.b.shape[0], p.a.shape[0]
    header = struct.pack(
        "12if", p.x.dtype == torch.float16, capability, order, M, N, K, r, p.pages.shape[0], p.pages.stride(0),
        p.pages.dtype == torch.float32, p.bias is not None, p.slots is not None, p.scale,
    )  # fmt: skip
    tensors = (p.x, p.weight, p.bias, p.a, p.b.mT, _span(p.pages), p.slots)
    payload = b"".join(_bytes(t) for t in tensors if t is not None)
    done = subprocess.run([str(program)], input=header + payload, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    out = bytearray(done.stdout)
    fits, *plan = struct.unpack_from("5i", out)
    assert fits
    y = torch.frombuffer(out, dtype=p.x.dtype, offset=20, count=M * N).reshape(M, N)
    saved = torch.frombuffer(out, dtype=torch.float32, offset=20 + 2 * M * N).reshape(M, r)
    return Plan(*map(bool, plan[:3]), plan[3]), y, saved


def _span(pages: Tensor) -> Tensor:
    """All numbers from the first of the first page to the last of the last."""
    S, r, _ = pages.shape
    return pages.as_strided(((S - 1) * pages.stride(0) + r * r,), (1,))


def _bytes(t: Tensor) -> bytes:
    return bytes(t.contiguous().view(torch.uint8).numpy())


def check(problem: Problem, y: Tensor, p: Tensor) -> None:
    exact = problem.to(torch.float64)
    expected_y, expected_p = reference.linear(*exact.forward_args())
    assert_within_twice(y, naive_linear(problem), expected_y, "y")
    assert_within_twice(p, reference.linear(*problem.forward_args())[1], expected_p, "p")


@pytest.mark.parametrize("slots", [None, "mixed", "skewed"])
@pytest.mark.parametrize("case", CASES)
def test_within_twice_plain_torch(program, case, slots):
    capability, shape, expected = CASES[case]
    problem = make(shape, torch.bfloat16, slots=slots, bias=slots != "skewed")
    plan, y, p = run(program, capability, problem)
    assert plan == expected
    check(problem, y, p)


@pytest.mark.parametrize("pages", ["fp16", "fp32"])
@pytest.mark.parametrize("case", KERNELS)
def test_fp16_and_pages_in_fp32(program, case, pages):
    capability, shape, _ = CASES[case]
    problem = make(shape, torch.float32, slots="mixed").to(torch.float16, DTYPES[pages])
    _, y, p = run(program, capability, problem)
    check(problem, y, p)


@pytest.mark.parametrize("after", [8, 5], ids=["in eights", "one by one"])
@pytest.mark.parametrize("pages", ["bf16", "fp32"])
@pytest.mark.parametrize("case", KERNELS)
def test_pages_of_a_slab_are_read_where_they_lie(program, case, pages, after):
    capability, shape, _ = CASES[case]
    problem = make(shape, torch.float32, slots="mixed").to(torch.bfloat16, DTYPES[pages])
    _, y, p = run(program, capability, problem)
    problem.pages = in_slab(problem.pages, before=8, after=after)
    _, other_y, other_p = run(program, capability, problem)
    assert torch.equal(y, other_y) and torch.equal(p, other_p)


@pytest.mark.parametrize("case", KERNELS)
def test_q_keeps_the_range_and_precision_of_fp32(program, case):
    capability, shape, _ = CASES[case]
    problem = make(shape, torch.float32, bias=False)
    problem.weight[:] = 0  # nothing hides what the low-rank part loses
    problem.pages *= 2.0**20
    problem.b *= 2.0**-12
    problem.scale = 2.0**-8
    problem = problem.to(torch.float16, torch.float32)
    _, y, _ = run(program, capability, problem)
    expected, _ = reference.linear(*problem.to(torch.float64).forward_args())
    rounded_once = expected.to(torch.float16)
    assert_within_twice(y, rounded_once, expected, "y")


@pytest.mark.parametrize("case", KERNELS)
def test_base_rows_have_no_low_rank_term(program, case):
    capability, shape, _ = CASES[case]
    problem = make(shape, torch.bfloat16, slots="mixed")
    _, y, _ = run(program, capability, problem)
    rows = problem.slots < 0
    assert rows.any()
    problem.pages[:] = 0
    _, base, _ = run(program, capability, problem)
    assert torch.equal(y[rows], base[rows]) and not torch.equal(y[~rows], base[~rows])
    problem.b[:] = torch.inf  # skipped, not multiplied by zero
    _, skipped, _ = run(program, capability, problem)
    assert torch.equal(skipped[rows], base[rows])


@pytest.mark.parametrize("case", KERNELS)
def test_order_of_copies_and_threads_does_not_matter(program, case):
    capability, shape, _ = CASES[case]
    problem = make(shape, torch.bfloat16, slots="mixed")
    _, y, p = run(program, capability, problem)
    _, other_y, other_p = run(program, capability, problem, order=True)
    assert torch.equal(y, other_y) and torch.equal(p, other_p)


# One kernel on sm_80; on sm_90 every kernel of the single launch; two launches.
@pytest.mark.parametrize(
    ("capability", "shape", "batches"),
    [(8, (60, 520, 40, 16, 3), (1, 9, 30)), (9, (60, 512, 40, 16, 3), (1, 9, 30)), (9, (70, 264, 20, 40, 3), (1, 33))],
    ids=["sm_80", "sm_90", "two kernels"],
)
def test_a_row_does_not_depend_on_its_batch(program, capability, shape, batches):
    whole = make(shape, torch.bfloat16, slots="mixed")
    plan, y, p = run(program, capability, whole)
    for M in batches:
        part = make(shape, torch.bfloat16, slots="mixed")
        part.x, part.slots = whole.x[-M:], whole.slots[-M:]
        part_plan, part_y, part_p = run(program, capability, part)
        assert part_plan.two_kernels == plan.two_kernels
        assert torch.equal(part_y, y[-M:]) and torch.equal(part_p, p[-M:])


def test_a_slot_out_of_range_stops_the_device(program):
    problem = make((5, 264, 40, 16, 2), torch.bfloat16, slots="mixed")
    problem.slots[3] = 2
    with pytest.raises(AssertionError, match="slot out of range"):
        run(program, 8, problem)
