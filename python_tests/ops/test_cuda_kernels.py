"""The source of the CUDA kernels, run on the CPU by the shim of csrc/testing: the arithmetic, not the speed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference
from loraxs_ext.ops.philox import drop_threshold

from .problems import DTYPES, Problem, assert_within_twice, far_apart, in_slab, make
from .simt import COMPILER, build

# AddressSanitizer watches a library only in a process that was started with it: see the last test.
SANITIZE = os.environ.get("LORAXS_TEST_SANITIZE", "undefined")

# (M, K, N, r, S): part of a token tile, several of them, widths that are no multiple of four, ranks over one pass.
SHAPES = {
    "one token": (1, 32, 24, 4, 2),
    "rank 1, odd widths": (3, 17, 5, 1, 3),
    "two tiles": (13, 130, 300, 16, 4),
    "rank 21": (8, 64, 33, 21, 2),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("simt") / "add_delta.so"
    return ctypes.CDLL(str(build("add_delta_simt.cpp", output, "-fPIC", "-shared", f"-fsanitize={SANITIZE}")))


def run(kernels: ctypes.CDLL, name: str, p: Problem, y: Tensor) -> Tensor:
    """add_delta by the kernel, on a copy of y."""
    out, bt = y.clone(), p.b.mT.contiguous()
    M, K = p.x.shape
    sizes = torch.tensor([M, K, y.shape[1], p.a.shape[0], p.pages.shape[0], p.pages.stride(0)])
    pointers = [t.data_ptr() if t is not None else None for t in (out, p.x, p.a, bt, p.pages, p.slots, p.rng)]
    getattr(kernels, name)(
        *(ctypes.c_void_p(pointer) for pointer in pointers),
        ctypes.c_uint32(drop_threshold(p.p_drop) - 1 if p.p_drop else 0),
        ctypes.c_void_p(sizes.data_ptr()),
        ctypes.c_double(p.scale),
        ctypes.c_double(1 / (1 - p.p_drop)),
    )
    return out


@pytest.mark.parametrize("p_drop", [0.0, 0.3])
@pytest.mark.parametrize("slots", [None, "mixed", "skewed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_add_delta_within_twice_plain_torch(kernels, dtype, shape, slots, p_drop):
    problem = make(SHAPES[shape], DTYPES[dtype], slots=slots, p_drop=p_drop)
    exact = problem.to(torch.float64)
    expected, _ = reference.add_delta(exact.dy, exact.x, *exact.low_rank_args())
    plain, _ = reference.add_delta(problem.dy, problem.x, *problem.low_rank_args())
    got = run(kernels, f"add_delta_{dtype}", problem, problem.dy)
    assert_within_twice(got, plain, expected, "y")
    if problem.slots is not None:
        base = problem.slots < 0
        assert torch.equal(got[base], problem.dy[base])


def test_add_delta_takes_pages_in_fp32(kernels):
    problem = make(SHAPES["two tiles"], torch.float32, slots="mixed").to(torch.bfloat16, torch.float32)
    exact = problem.to(torch.float64)
    expected, _ = reference.add_delta(exact.dy, exact.x, *exact.low_rank_args())
    plain, _ = reference.add_delta(problem.dy, problem.x, *problem.low_rank_args())
    assert_within_twice(run(kernels, "add_delta_bf16_fp32_pages", problem, problem.dy), plain, expected, "y")


@pytest.mark.parametrize("place", [in_slab, far_apart])
def test_pages_of_a_slab_are_read_where_they_lie(kernels, place):
    problem = make(SHAPES["two tiles"], torch.bfloat16, slots="mixed")
    expected = run(kernels, "add_delta_bf16", problem, problem.dy)
    problem.pages = place(problem.pages)
    assert torch.equal(run(kernels, "add_delta_bf16", problem, problem.dy), expected)


@pytest.mark.skipif(SANITIZE != "undefined", reason="this is the process that the test starts")
def test_add_delta_stays_inside_its_buffers():
    """All of the above once more, with every buffer of torch between guarded zones."""
    if COMPILER is None:
        pytest.skip("g++ is not installed")
    preload = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(preload):
        pytest.skip("g++ has no libasan here")
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "LORAXS_TEST_SANITIZE": "address,undefined",
    }
    # PEFT imports these where they are installed; they do not survive the sanitizer, and nothing here needs them.
    hidden = "sys.modules.update(bitsandbytes=None, torchao=None)"
    start = f"import pytest, sys; {hidden}; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
