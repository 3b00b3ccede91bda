"""The source of the CUDA linear for few tokens, run on the CPU by the shim of csrc/testing: arithmetic and addresses.

What no shim shows: speed, races, and what the tensor cores round inside one product.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import reference

from .problems import DTYPES, Problem, assert_within_twice, make, naive_linear
from .simt import build


class Plan(NamedTuple):
    fits: bool
    two_kernels: bool
    cluster: bool
    bulk: bool
    splits: int


# Per kernel: compute capability, (M, K, N, r, S), and what the plan has to choose.
CASES = {
    "global parts, one token": (8, (1, 520, 130, 4, 3), Plan(True, False, False, False, 2)),
    "one part, rank 1": (8, (3, 40, 17, 1, 2), Plan(True, False, False, False, 1)),
    "global parts, rank 3": (8, (13, 1032, 33, 3, 4), Plan(True, False, False, False, 4)),
    "global parts, 21 tokens": (8, (21, 264, 140, 16, 2), Plan(True, False, False, False, 2)),
    "global parts, 61 tokens": (8, (61, 264, 72, 16, 3), Plan(True, False, False, False, 2)),
    "global parts, rank 21": (8, (9, 280, 40, 21, 2), Plan(True, False, False, False, 2)),
    "sm_90 without bulk copies": (9, (5, 264, 40, 16, 2), Plan(True, False, False, False, 2)),
    "bulk, 5 tokens": (9, (5, 1024, 130, 16, 7), Plan(True, False, True, True, 4)),
    "bulk, 11 tokens": (9, (11, 768, 33, 7, 2), Plan(True, False, True, True, 2)),
    "bulk, rank 32": (9, (16, 512, 72, 32, 2), Plan(True, False, True, True, 2)),
    "cluster, 30 tokens": (9, (30, 512, 132, 16, 4), Plan(True, False, True, False, 2)),
    "cluster, 50 tokens": (10, (50, 280, 65, 8, 2), Plan(True, False, True, False, 2)),
    "two kernels, 7 tokens": (9, (7, 776, 130, 100, 3), Plan(True, True, True, False, 4)),
    "two kernels, 33 tokens": (9, (33, 264, 72, 24, 2), Plan(True, True, True, False, 2)),
    "two kernels, 100 tokens": (9, (100, 264, 36, 128, 3), Plan(True, True, True, False, 2)),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("simt") / "linear_decode.so"
    return ctypes.CDLL(str(build("linear_decode_simt.cpp", output, "-fPIC", "-shared", "-fsanitize=undefined")))


def plan(kernels: ctypes.CDLL, shape: tuple[int, int, int, int, int], capability: int) -> Plan:
    M, K, N, r, _ = shape
    out = (ctypes.c_int * 5)()
    kernels.linear_decode_plan(M, N, K, r, capability, out)
    return Plan(*map(bool, out[:4]), out[4])


def run(kernels: ctypes.CDLL, capability: int, p: Problem, order: int = 0) -> tuple[Tensor, Tensor]:
    """y and p by the kernels, over outputs full of NaN."""
    M, K, N, r = *p.x.shape, p.b.shape[0], p.a.shape[0]
    y = torch.full((M, N), torch.nan, dtype=p.x.dtype)
    saved = torch.full((M, r), torch.nan)
    bt = p.b.mT.contiguous()
    tensors = (y, saved, p.x, p.weight, p.bias, p.a, bt, p.pages, p.slots)
    sizes = (ctypes.c_int * 5)(M, N, K, r, p.pages.shape[0])
    refused = kernels.linear_decode(
        int(p.x.dtype == torch.float16), capability, order,
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
        sizes, ctypes.c_float(p.scale), int(p.pages.dtype == torch.float32),
    )  # fmt: skip
    assert not refused
    return y, saved


def check(problem: Problem, y: Tensor, p: Tensor) -> None:
    exact = problem.to(torch.float64)
    expected_y, expected_p = reference.linear(*exact.forward_args())
    assert_within_twice(y, naive_linear(problem), expected_y, "y")
    assert_within_twice(p, reference.linear(*problem.forward_args())[1], expected_p, "p")


@pytest.mark.parametrize("slots", [None, "mixed", "skewed"])
@pytest.mark.parametrize("case", CASES)
def test_within_twice_plain_torch(kernels, case, slots):
    capability, shape, expected = CASES[case]
    assert plan(kernels, shape, capability) == expected
    problem = make(shape, torch.bfloat16, slots=slots, bias=slots != "skewed")
    check(problem, *run(kernels, capability, problem))
