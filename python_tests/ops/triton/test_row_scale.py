"""The Triton owner of loraxs::row_scale: in the interpreter against the reference, and compiled for three GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference

from ..problems import DTYPES, assert_within_twice
from ..test_row_scale import FORMS, SHAPES, make_scaling
from .harness import Interpreter, Launch, compile_launch, launches_of


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_error_within_twice_plain_torch(interpreted: Interpreter, dtype, shape, form):
    p = make_scaling(SHAPES[shape], form).to(DTYPES[dtype])
    exact = reference.row_scale(*p.to(torch.float64).args())
    plain = reference.row_scale(*p.args())
    got = interpreted("row_scale.row_scale", *p.args())
    for name, ours, theirs, truth in zip(("g", "inverse_norm"), got, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert_within_twice(ours, theirs, truth, name)


def test_strides_do_not_matter(interpreted: Interpreter):
    p = make_scaling(SHAPES["rank 5"], "any basis").to(torch.float32)
    expected = interpreted("row_scale.row_scale", *p.args())
    strided = replace(p, **{name: _scattered(getattr(p, name)) for name in ("rho", "b", "pages", "m", "c", "root")})
    got = interpreted("row_scale.row_scale", *strided.args())
    assert all(torch.equal(s, t) for s, t in zip(got, expected, strict=True))


def _scattered(t: Tensor) -> Tensor:
    """The same values with no two of them side by side, in the opposite order of dimensions."""
    wide = torch.full((2 * t.shape[-1], *t.shape[:-1]), float("nan"), dtype=t.dtype)
    view = wide[::2].permute(*range(1, t.dim()), 0)
    return view.copy_(t)


def test_a_slot_does_not_depend_on_the_others_and_repeats(interpreted: Interpreter):
    p = make_scaling(SHAPES["many slots"], "reference").to(torch.float16, torch.float32)
    together, again = (interpreted("row_scale.row_scale", *p.args())[0] for _ in range(2))
    assert torch.equal(together, again)
    for slot in (0, 17, 30):
        alone = replace(p, pages=p.pages[slot, None], m=p.m[slot, None])
        assert torch.equal(interpreted("row_scale.row_scale", *alone.args())[0][0], together[slot])


def test_rows_of_zeros_and_no_rows(interpreted: Interpreter):
    p = make_scaling(SHAPES["rank 5"], "mirror").to(torch.float32)
    p.rho[3], p.b[3] = 0, 0
    g, inverse_norm = interpreted("row_scale.row_scale", *p.args())
    assert (g[:, 3] == 0).all() and (inverse_norm[:, 3] == 0).all() and torch.isfinite(g).all()
    none = replace(p, rho=p.rho[:0], b=p.b[:0], m=p.m[:, :0])
    assert interpreted("row_scale.row_scale", *none.args())[0].shape == (4, 0)


def _launch(dtype: torch.dtype, r: int, form: str) -> Launch:
    from loraxs_ext.ops.triton.row_scale import row_scale

    def meta(*size: int) -> Tensor:
        return torch.empty(*size, device="meta")

    N, S = 4096, 8
    sigma = meta(r) if form == "reference" else None
    c, root = (meta(N, r), meta(r, r)) if form == "any basis" else (None, None)
    b = meta(r, N).to(dtype).mT
    (launch,) = launches_of(row_scale, meta(N), b, meta(S, r, r), sigma, meta(S, N), 0.5, c, root)
    return launch


# Every form and rank on one GPU; the others differ in what the compiler makes of the same tiles.
COMPILED = [
    *((dtype, r, form, 90) for dtype in ("fp32", "bf16") for r in (16, 256) for form in FORMS),
    *((dtype, 64, "reference", arch) for dtype in ("fp32", "bf16", "fp16") for arch in (80, 100)),
]


@pytest.mark.parametrize(("dtype", "r", "form", "arch"), COMPILED)
def test_compiles_without_spills_and_stays_in_fp32(dtype, r, form, arch):
    compiled = compile_launch(_launch(DTYPES[dtype], r, form), arch)
    assert compiled.stack == 0 and compiled.registers <= 128 and compiled.shared <= 24 * 1024
    assert compiled.tensor_core() == set() and "fma.rn" in compiled.ptx


def test_one_launch_covers_all_slots():
    launch = _launch(torch.bfloat16, 16, "reference")
    assert launch.grid == (8 * 128,)
