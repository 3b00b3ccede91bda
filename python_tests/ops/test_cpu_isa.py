"""The compiled CPU ops on every instruction-set level that this machine has, each against fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from loraxs_ext import ops
from loraxs_ext.ops import reference
from loraxs_ext.ops.philox import keep_mask

from .problems import DTYPES, assert_within_twice, make, naive_linear

if not ops.backends.COMPILED:
    pytest.skip("the compiled ops are not built", allow_module_level=True)

from loraxs_ext import _C  # noqa: E402

FEATURES = {"portable": True, **_C.cpu_features()}
LEVELS = [name for name in _C.build_info()["cpu_isas"] if FEATURES[name]]

# (M, K, N, r, S): register blocks and tiles with and without remainders in every dimension.
SHAPES = {
    "one token": (1, 2049, 130, 16, 1),
    "three tokens, rank 1": (3, 17, 3, 1, 2),
    "part of a tile": (9, 100, 65, 33, 4),
    "few tokens, long sums in the gradient": (11, 131, 700, 6, 4),
    "few tokens, several strips of the gradient": (12, 2100, 40, 3, 2),
    "one tile and a row": (17, 1090, 47, 16, 3),
    "two tiles and a row": (33, 64, 2049, 5, 3),
    "whole tiles": (64, 128, 192, 64, 5),
    "rank 32": (21, 40, 96, 32, 15),
    "pages that outgrow a cache": (300, 32, 64, 64, 300),
    "many tokens, no whole tile": (331, 75, 83, 20, 3),
    "many tokens, one column of tiles": (1050, 96, 41, 7, 4),
    "many tokens, rank 100": (520, 64, 70, 100, 2),
    "rank 100": (50, 96, 200, 100, 2),
    "rank beyond tiles": (20, 40, 50, 260, 2),
}


@pytest.fixture(params=LEVELS)
def level(request) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.mark.parametrize("slots", [None, "mixed", "skewed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_error_within_twice_plain_torch(level, dtype, shape, slots):
    problem = make(SHAPES[shape], DTYPES[dtype], slots=slots, p_drop=0.3 if slots == "mixed" else 0.0)
    exact = problem.to(torch.float64)
    y64, p64 = reference.linear(*exact.forward_args())
    dx64, dpages64 = reference.linear_backward(*exact.backward_args(p64))
    p_plain = reference.linear(*problem.forward_args())[1]
    dx_plain, dpages_plain = reference.linear_backward(*problem.backward_args(p_plain))

    y, p = torch.ops.loraxs.linear(*problem.forward_args())
    dx, dpages = torch.ops.loraxs.linear_backward(*problem.backward_args(p))
    assert _C.cpu_isa() == level
    assert_within_twice(y, naive_linear(problem), y64, "y")
    assert_within_twice(p, p_plain, p64, "p")
    assert_within_twice(dx, dx_plain, dx64, "dx")
    assert_within_twice(dpages, dpages_plain, dpages64, "dpages")


@pytest.mark.parametrize("p_drop", [0.0, 0.3])
@pytest.mark.parametrize("shape", ["one token", "whole tiles"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_output_alone_is_the_same(level, dtype, shape, p_drop):
    problem = make(SHAPES[shape], DTYPES[dtype], slots="mixed", p_drop=p_drop)
    assert torch.equal(
        torch.ops.loraxs._linear_output(*problem.forward_args()), torch.ops.loraxs.linear(*problem.forward_args())[0]
    )


def test_sums_in_parts_are_the_same_sums(level):
    # So many tokens take a part of a long sum at once, fewer the whole: the order of the sum is one and the same.
    if not level.startswith(("avx512", "amx")):
        pytest.skip("torch forms the base product at this level")
    many = make((400, 2600, 50, 20, 3), slots="mixed")
    few = replace(many, x=many.x[:40], slots=many.slots[:40])
    for all_rows, first_rows in zip(
        torch.ops.loraxs.linear(*many.forward_args()), torch.ops.loraxs.linear(*few.forward_args()), strict=True
    ):
        assert torch.equal(all_rows[:40], first_rows)


@pytest.mark.parametrize("M", [1, 5, 12])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_infinities_in_the_weight_reach_the_gradient(level, dtype, M):
    # The last block of rows of W is not whole: what stands for the missing ones must not turn an infinity into NaN.
    problem = make((M, 70, 43, 4, 1), DTYPES[dtype])
    problem.weight[42, 7] = float("inf")
    _, p = torch.ops.loraxs.linear(*problem.forward_args())
    dx, _ = torch.ops.loraxs.linear_backward(*problem.backward_args(p))
    assert torch.isinf(dx[:, 7]).all() and torch.isfinite(dx[:, :7]).all() and torch.isfinite(dx[:, 8:]).all()


@pytest.mark.parametrize("M", [1, 8, 40])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_dropout_mask_is_the_contracts(level, dtype, M):
    # With a, b and R the identity the low-rank part is the masked x itself, so that the mask can be read off.
    K, p_drop = 100, 0.37
    eye = torch.eye(K, dtype=DTYPES[dtype])
    x = torch.ones(M, K, dtype=DTYPES[dtype])
    rng = torch.tensor([-(2**62) - 12345, 2**33 + 7])
    out, p = torch.ops.loraxs.add_delta(torch.zeros_like(x), x, eye, eye, eye[None], None, 1.0, p_drop, rng)
    keep = keep_mask(M, K, p_drop, rng)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(p, keep / (1 - p_drop), check_dtype=False)
    dx, _ = torch.ops.loraxs.linear_backward(
        x, None, eye, eye, eye[None], None, p, 1.0, p_drop, rng, True, False
    )  # fmt: skip
    assert torch.equal(dx != 0, keep)


@pytest.mark.parametrize("M", [1, 40])
def test_half_types_round_once_and_to_nearest_even(level, M):
    # x a = 1 and b carries values between two neighbours of bf16 and of fp16: y + 1 * b must round as torch does.
    for dtype in (torch.bfloat16, torch.float16):
        y = torch.randn(M, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
        b = torch.randn(96, 1, generator=torch.Generator().manual_seed(2)).to(dtype)
        one = torch.ones(1, 1, 1, dtype=dtype)
        x = torch.ones(M, 1, dtype=dtype)
        out, _ = torch.ops.loraxs.add_delta(y, x, one[0], b, one, None, 1.0)
        assert torch.equal(out, (y.float() + b.float().T).to(dtype))


def test_infinities_and_nans_reach_the_output(level):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = make((20, 40, 36, 8, 1), dtype)
        problem.x[3, 5], problem.x[4, 6] = float("inf"), float("nan")
        out, _ = torch.ops.loraxs.add_delta(problem.dy[:, :36], problem.x, *problem.low_rank_args())
        assert not torch.isfinite(out[3]).any() and torch.isnan(out[4]).all()
        assert torch.isfinite(out[torch.tensor([0, 1, 2, 5, 19])]).all()


def _in_use(cap: str) -> subprocess.CompletedProcess[str]:
    code = "import loraxs_ext.ops; from loraxs_ext import _C; print(_C.cpu_isa())"
    env = {**os.environ, "LORAXS_CPU_ISA": cap}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_environment_caps_the_level():
    assert _in_use("portable").stdout.strip() == "portable"


def test_unknown_level_is_refused():
    run = _in_use("avx1024")
    assert run.returncode != 0 and "LORAXS_CPU_ISA must be portable, avx2" in run.stderr
    with pytest.raises(ValueError, match="name: expected .* got 'avx1024'"):
        _C.set_cpu_isa("avx1024")


def test_build_info_is_complete():
    info = _C.build_info()
    assert info["compiler"] and info["torch"] and "portable" in info["cpu_isas"]
    assert info["cuda"] == bool(info["cuda_archs"])
