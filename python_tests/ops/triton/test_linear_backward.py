"""The Triton owner of loraxs::linear_backward: in the interpreter against the reference, compiled for three GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference

from ..problems import DTYPES, Problem, assert_within_twice, make
from .harness import Interpreter, Launch, compile_launch, launches_of

# (M, K, N, r, S): one token, ranks that are no power of two, odd widths, more slots than tokens, several chunks of rows
# per slot, and several tiles in every direction.
SHAPES = {
    "one token": (1, 64, 48, 4, 1),
    "rank 1": (29, 33, 17, 1, 3),
    "odd widths": (13, 70, 127, 5, 4),
    "rank 100": (9, 66, 34, 100, 2),
    "many slots": (9, 48, 64, 16, 31),
    "tall": (300, 34, 36, 16, 3),
}


def saved_p(problem: Problem) -> Tensor:
    return reference.linear(*problem.forward_args())[1]


def backward(interpreted: Interpreter, p: Problem, saved: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    return interpreted("linear_backward.linear_backward", *p.backward_args(saved), **options)


def assert_gradients(interpreted: Interpreter, problem: Problem, **options: bool) -> None:
    exact = problem.to(torch.float64)
    expected = reference.linear_backward(*exact.backward_args(saved_p(exact)))
    saved = saved_p(problem)
    plain = reference.linear_backward(*problem.backward_args(saved))
    got = backward(interpreted, problem, saved, **options)
    for name, ours, theirs, truth in zip(("dx", "dpages"), got, plain, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_within_twice(ours, theirs, truth, name)


@pytest.mark.parametrize(
    ("slots", "p_drop"), [(None, 0.0), (None, 0.4), ("mixed", 0.4), ("base", 0.0), ("skewed", 0.0)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_error_within_twice_plain_torch(interpreted: Interpreter, dtype, shape, slots, p_drop):
    assert_gradients(interpreted, make(SHAPES[shape], DTYPES[dtype], slots=slots, p_drop=p_drop))


@pytest.mark.parametrize("slots", [None, "mixed", "base"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_base_by_torch(interpreted: Interpreter, dtype, slots):
    problem = make(SHAPES["odd widths"], DTYPES[dtype], slots=slots, p_drop=0.4)
    assert_gradients(interpreted, problem, fuse_base=False)
    dx, _ = backward(interpreted, problem, saved_p(problem), fuse_base=False)
    if slots is not None:
        rows = problem.slots < 0
        assert rows.any() and torch.equal(dx[rows], (problem.dy @ problem.weight)[rows])


@pytest.mark.parametrize("fuse_base", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_weight_only_the_low_rank_part(interpreted: Interpreter, dtype, fuse_base):
    problem = make(SHAPES["odd widths"], DTYPES[dtype], slots="mixed", p_drop=0.4)
    saved = saved_p(problem)
    problem.weight = None
    exact = replace(problem.to(torch.float64))
    plain = reference.linear_backward(*problem.backward_args(saved))
    expected = reference.linear_backward(*exact.backward_args(saved.double()))
    got = backward(interpreted, problem, saved, fuse_base=fuse_base)
    assert_within_twice(got[0], plain[0], expected[0], "dx")
    assert (got[0][problem.slots < 0] == 0).all()


@pytest.mark.parametrize("fuse_base", [True, False])
def test_half_types_take_pages_in_fp32(interpreted: Interpreter, fuse_base):
    problem = make(SHAPES["tall"], torch.bfloat16, slots="mixed").to(torch.bfloat16, torch.float32)
    assert_gradients(interpreted, problem, fuse_base=fuse_base)


def test_long_chunks_of_high_ranks(interpreted: Interpreter):
    p = make((1100, 20, 24, 68, 2), slots="skewed")
    exact = p.to(torch.float64)
    needs = False, True
    expected = reference.linear_backward(*exact.backward_args(saved_p(exact))[:-2], *needs)[1]
    args = *p.backward_args(saved_p(p))[:-2], *needs
    got = interpreted("linear_backward.linear_backward", *args)[1]
    assert_within_twice(got, reference.linear_backward(*args)[1], expected, "dpages")


def test_leading_dimensions_and_strides_do_not_matter(interpreted: Interpreter):
    p = make((24, 40, 36, 8, 3), slots="mixed")
    saved = saved_p(p)
    dx, dpages = backward(interpreted, p, saved)
    q = make((24, 40, 36, 8, 3), slots="mixed")
    q.b, q.weight, q.pages = p.b.contiguous(), p.weight.T.contiguous().T, p.pages.mT.contiguous().mT
    q.a, q.slots = p.a.T.contiguous().T, torch.stack((p.slots, p.slots), 1)[:, 0]
    q.dy = p.dy.view(2, 3, 4, 36).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    got = backward(interpreted, q, torch.cat((saved, saved), 1)[:, :8])
    assert got[0].shape == (2, 3, 4, 40) and got[0].is_contiguous()
    assert torch.equal(got[0].view(24, 40), dx) and torch.equal(got[1], dpages)


@pytest.mark.parametrize("fuse_base", [True, False])
def test_repeats_to_the_last_bit(interpreted: Interpreter, fuse_base):
    p = make(SHAPES["tall"], torch.float16, slots="mixed", p_drop=0.3)
    saved = saved_p(p)
    first, again = (backward(interpreted, p, saved, fuse_base=fuse_base) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_slot_and_a_row_do_not_depend_on_the_others(interpreted: Interpreter, dtype):
    # Slots of about 175 rows: two chunks each, that other rows would shift if chunks were counted from the first token.
    p = make((700, 24, 20, 8, 3), DTYPES[dtype], slots="mixed")
    saved = saved_p(p)
    dx, dpages = backward(interpreted, p, saved)
    for slot in range(3):
        rows = p.slots == slot
        alone = replace(p, dy=p.dy[rows], slots=p.slots[rows])
        dx_alone, dpages_alone = backward(interpreted, alone, saved[rows])
        assert torch.equal(dpages_alone[slot], dpages[slot])
        assert torch.equal(dx_alone, dx[rows])


def test_without_slots_is_slot_zero(interpreted: Interpreter):
    p = make(SHAPES["tall"])
    saved = saved_p(p)
    implicit = backward(interpreted, p, saved)
    p.slots = torch.zeros(300, dtype=torch.int32)
    explicit = backward(interpreted, p, saved)
    assert all(torch.equal(s, t) for s, t in zip(implicit, explicit, strict=True))
    assert (implicit[1][1:] == 0).all() and (implicit[1][0] != 0).any()


@pytest.mark.parametrize("bad", [-7, 3, 2**31 - 1])
def test_slots_out_of_range_count_as_base(interpreted: Interpreter, bad):
    # On the CPU the op refuses them; a launcher cannot look without waiting for the device, and must stay in bounds.
    p = make(SHAPES["tall"], slots="mixed")
    saved = saved_p(p)
    expected = backward(interpreted, p, saved)
    p.slots = torch.where(p.slots < 0, bad, p.slots)
    got = backward(interpreted, p, saved)
    assert all(torch.equal(s, t) for s, t in zip(got, expected, strict=True))


def test_a_base_row_that_is_not_finite_spoils_no_slot(interpreted: Interpreter):
    p = make(SHAPES["tall"], slots="mixed")
    saved = saved_p(p)
    expected = backward(interpreted, p, saved)[1]
    p.dy[p.slots < 0] = float("inf")
    saved[p.slots < 0] = float("nan")
    assert torch.equal(backward(interpreted, p, saved)[1], expected)


def test_what_is_not_needed_is_not_computed(interpreted: Interpreter):
    p = make(SHAPES["odd widths"], slots="mixed")
    saved = saved_p(p)
    both = backward(interpreted, p, saved)
    args = p.backward_args(saved)[:-2]
    dx, nothing = interpreted("linear_backward.linear_backward", *args, True, False)
    assert torch.equal(dx, both[0]) and nothing.shape == (0,)
    nothing, dpages = interpreted("linear_backward.linear_backward", *args, False, True)
    assert torch.equal(dpages, both[1]) and nothing.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 8, 6, 2, 2), (3, 0, 6, 2, 2), (3, 8, 0, 2, 2)], ids=["M=0", "K=0", "N=0"])
def test_empty_problems(interpreted: Interpreter, shape):
    M, K, N, r, S = shape
    slots = torch.zeros(M, dtype=torch.int32)
    args = (torch.ones(M, N), torch.ones(N, K), torch.ones(r, K), torch.ones(N, r), torch.ones(S, r, r), slots)
    dx, dpages = interpreted(
        "linear_backward.linear_backward", *args, torch.ones(M, r), 1.0, 0.0, None, True, True
    )  # fmt: skip
    assert torch.equal(dx, torch.zeros(M, K)) and torch.equal(dpages, torch.zeros(S, r, r))


def launches(
    dtype: torch.dtype, M: int, r: int, mixed: bool, p_drop: float = 0.0, K: int = 4096, N: int = 4096, **options: bool
) -> dict[str, Launch]:
    """The launches of this file for 8 slots, by kernel."""
    from loraxs_ext.ops.triton.linear_backward import linear_backward

    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    made = launches_of(
        linear_backward, meta(M, N), meta(N, K), meta(r, K), meta(r, N).mT, meta(8, r, r, dtype=torch.float32),
        meta(M, dtype=torch.int32) if mixed else None, meta(M, r, dtype=torch.float32), 0.5, p_drop,
        meta(2, dtype=torch.int64) if p_drop else None, True, True, **options,
    )  # fmt: skip
    return {launch.kernel.__name__: launch for launch in made}


TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# What a program can have on the smallest GPUs of these generations; two fit on the larger ones.
SHARED = 99 * 1024


@pytest.mark.parametrize("arch", TENSOR_CORE)
@pytest.mark.parametrize(
    ("dtype", "M", "r", "p_drop"), [("bf16", 64, 256, 0.0), ("bf16", 4096, 16, 0.0), ("fp16", 4096, 64, 0.1)]
)
def test_dx_uses_tensor_cores_and_does_not_spill(dtype, M, r, p_drop, arch):
    compiled = compile_launch(launches(DTYPES[dtype], M, r, True, p_drop)["_dx_kernel"], arch)
    assert compiled.stack == 0 and compiled.registers <= 192 and compiled.shared <= SHARED
    assert compiled.tensor_core() == {TENSOR_CORE[arch]}


@pytest.mark.parametrize("fuse_base", [True, False])
@pytest.mark.parametrize("M", [300, 4096])
def test_dx_does_not_spill_at_odd_widths(M, fuse_base):
    launch = launches(torch.bfloat16, M, 65, True, 0.1, K=4097, N=2049, fuse_base=fuse_base)["_dx_kernel"]
    compiled = compile_launch(launch, 90)
    assert compiled.stack == 0 and compiled.shared <= SHARED and compiled.tensor_core() == {TENSOR_CORE[90]}


@pytest.mark.parametrize("arch", TENSOR_CORE)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_dx_in_fp32_uses_tensor_cores_only_as_tf32(precision, arch, monkeypatch):
    monkeypatch.setattr("loraxs_ext.ops.triton.linear_backward.precision", lambda dtype: precision)
    compiled = compile_launch(launches(torch.float32, 4096, 64, True, 0.1)["_dx_kernel"], arch)
    assert compiled.stack == 0 and compiled.registers <= 255
    assert compiled.tensor_core() == ({TENSOR_CORE[arch]} if precision == "tf32" else set())


@pytest.mark.parametrize("arch", TENSOR_CORE)
@pytest.mark.parametrize(("r", "mixed"), [(16, False), (256, True)])
def test_sums_over_rows_do_not_spill(r, mixed, arch):
    made = launches(torch.bfloat16, 4096, r, mixed)
    for kernel in ("_chunk_kernel", "total_kernel"):
        compiled = compile_launch(made[kernel], arch)
        assert compiled.stack == 0 and compiled.registers <= 255 and compiled.shared <= 48 * 1024, kernel


def test_the_grid_does_not_depend_on_the_slots():
    grids = [{name: launch.grid for name, launch in launches(torch.bfloat16, 512, 16, True).items()} for _ in range(2)]
    # 512 / 128 chunks and one unfilled one for each of 8 slots: on meta tensors no slot has a value at all.
    assert grids[0] == grids[1] and grids[0]["_chunk_kernel"] == (12, 1, 1) and grids[0]["total_kernel"] == (8, 1)
