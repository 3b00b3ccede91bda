"""`loraxs::rescale` and its backward by Triton: interpreted, and compiled for Ampere, Hopper and Blackwell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference

from ..problems import DTYPES, assert_within_twice
from ..test_rescale import SLOTS, make_rescaling, plainly
from .harness import Interpreter, compile_launch, launches_of

# (M, N, S): beside the tiles of 8 rows and 256 columns, and the chunks of 128 rows.
SHAPES = {"one token": (1, 48, 1), "odd widths": (13, 259, 4), "chunks and a rest": (300, 40, 2), "many": (9, 20, 31)}


# Every kind of slots in every shape, and every dtype where slots are mixed.
CASES = [
    *(("fp32", s, slots) for s in SHAPES for slots in SLOTS),
    *((d, s, "mixed") for d in ("bf16", "fp16") for s in SHAPES),
]


@pytest.mark.parametrize(("dtype", "shape", "slots"), CASES)
def test_error_within_twice_plain_torch(interpreted: Interpreter, dtype, shape, slots):
    p = make_rescaling(SHAPES[shape], DTYPES[dtype], slots=slots, bias=slots != "mixed")
    exact = p.to(torch.float64)
    expected = reference.rescale(*exact.args()), *reference.rescale_backward(*exact.backward_args())
    got = interpreted("rescale.rescale", *p.args()), *interpreted("rescale.rescale_backward", *p.backward_args())
    for name, ours, theirs, truth in zip(("y", "dz", "dg"), got, plainly(p), expected, strict=True):
        assert_within_twice(ours, theirs, truth, name)


def test_base_rows_stay_to_the_last_bit_and_slots_beyond_count_as_base(interpreted: Interpreter):
    p = make_rescaling(SHAPES["odd widths"], torch.float32, slots="base", bias=False)
    p.slots[5] = 4
    assert torch.equal(interpreted("rescale.rescale", *p.args()), p.z)
    dz, dg = interpreted("rescale.rescale_backward", *p.backward_args())
    assert torch.equal(dz, p.dy) and (dg == 0).all()


def test_a_slot_does_not_depend_on_the_others_and_repeats(interpreted: Interpreter):
    p = make_rescaling(SHAPES["chunks and a rest"], torch.float32, slots="mixed")
    first, again = (interpreted("rescale.rescale_backward", *p.backward_args()) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(first, again, strict=True))
    rows = p.slots == 1
    alone = interpreted("rescale.rescale_backward", p.dy[rows], p.z[rows], p.g, p.slots[rows], False)[1]
    assert torch.equal(alone[1], first[1][1])


def test_strides_dimensions_and_empty_problems(interpreted: Interpreter):
    p = make_rescaling((24, 36, 3), torch.float32, slots="mixed")
    expected = interpreted("rescale.rescale", *p.args())
    scattered = torch.full((2, 3, 4, 72), torch.nan)[..., ::2].copy_(p.z.view(2, 3, 4, 36))
    got = interpreted("rescale.rescale", scattered, p.g.mT.contiguous().mT, p.slots, p.bias)
    assert torch.equal(got.view(24, 36), expected)
    none = interpreted("rescale.rescale_backward", p.dy[:0], p.z[:0], p.g, p.slots[:0], True)
    assert none[0].shape == (0, 36) and (none[1] == 0).all()
    assert interpreted("rescale.rescale", p.z[:, :0], p.g[:, :0], None, None).shape == (24, 0)


@pytest.mark.parametrize(
    ("dtype", "slots", "arch"),
    [("fp32", True, 90), *(("bf16", True, a) for a in (80, 100)), *(("bf16", False, a) for a in (80, 90, 100))],
)
def test_compiles_within_budget_and_moves_16_bytes_at_a_time(dtype, slots, arch):
    from loraxs_ext.ops.triton import rescale

    def meta(*size: int, kind: torch.dtype = DTYPES[dtype]) -> Tensor:
        return torch.empty(*size, dtype=kind, device="meta")

    M, N, S = 4096, 4096, 8
    z, g, chosen = meta(M, N), meta(S, N, kind=torch.float32), meta(M, kind=torch.int32) if slots else None
    forward = launches_of(rescale.rescale, z, g, chosen, meta(N))
    backward = launches_of(rescale.rescale_backward, z, z, g, chosen, True)
    assert [launch.kernel.__name__ for launch in forward] == ["_rescale_kernel"]
    kernels = ["_rescale_kernel"] * slots + ["_chunk_kernel", "total_kernel"]
    assert [launch.kernel.__name__ for launch in backward] == kernels
    for launch in (*forward, *backward):
        compiled = compile_launch(launch, arch)
        compiled.assert_within_budget(arch)
        assert compiled.registers <= 128 and compiled.tensor_core() == set()
        wide = "ld.global.v4.b32" in compiled.ptx
        assert wide or launch.kernel.__name__ == "total_kernel"
