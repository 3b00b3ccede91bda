"""The forward kernels compiled for Ampere, Hopper and Blackwell, as their launchers launch them.

Compiling proves that registers and shared memory suffice and that products run on tensor cores; it says nothing about
speed or about what a GPU computes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .harness import Launch, compile_launch, launches_of

MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def problem(M: int, K: int, N: int, r: int, dtype: torch.dtype, slots: bool = True) -> tuple:
    """The arguments of `linear` on the meta device, up to scale."""

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    chosen = empty(M, dtype=torch.int32) if slots else None
    bias, pages = (empty(N), empty(64, r, r)) if slots else (None, empty(1, r, r))
    return empty(M, K), empty(N, K), bias, empty(r, K), empty(r, N).mT, pages, chosen, 0.5


def forward(*args: object, p_drop: float = 0.0) -> list[Launch]:
    from loraxs_ext.ops.triton import linear

    rng = torch.empty(2, dtype=torch.int64, device="meta") if p_drop else None
    return launches_of(linear.linear, *args, p_drop, rng)


def in_place(x: Tensor, weight: Tensor, bias: Tensor, *rest: object) -> list[Launch]:
    from loraxs_ext.ops.triton import add_delta

    return launches_of(add_delta.add_delta_, torch.empty(len(x), len(bias), dtype=x.dtype, device="meta"), x, *rest)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Kernels whose product runs on the tensor cores of each generation; those with few rows keep to mma.sync.
CASES: dict[str, tuple[Callable[[], list[Launch]], set[str]]] = {
    "decode, r 16": (lambda: forward(*problem(64, 4096, 4096, 16, BF16)), {"_decode_kernel"}),
    "decode, r 32": (lambda: forward(*problem(128, 512, 16384, 32, FP16)), {"_decode_kernel"}),
    "decode, r 64": (lambda: forward(*problem(32, 14336, 4096, 64, BF16)), {"_project_kernel", "_decode_kernel"}),
    "decode, odd widths": (lambda: forward(*problem(5, 4097, 2049, 5, BF16, slots=False)), {"_decode_kernel"}),
    "decode, fp32": (lambda: forward(*problem(64, 4096, 4096, 32, FP32)), set()),
    "prefill, r 16": (lambda: forward(*problem(4096, 4096, 4096, 16, BF16)), {"_linear_kernel"}),
    "prefill, r 256": (lambda: forward(*problem(4096, 4096, 4096, 256, FP16)), {"_project_kernel", "_linear_kernel"}),
    "prefill, dropout": (
        lambda: forward(*problem(4096, 4096, 1024, 64, BF16), p_drop=0.1),
        {"_project_kernel", "_linear_kernel"},
    ),
    "prefill, fp32, dropout": (lambda: forward(*problem(4096, 4096, 4096, 256, FP32), p_drop=0.1), set()),
    # Sizes and strides of 1 become constants of the kernel, None arguments vanish.
    "decode, all sizes 1": (lambda: forward(*problem(1, 1, 1, 1, BF16)), set()),
    "prefill, all sizes 1": (lambda: forward(*problem(129, 1, 1, 1, BF16, slots=False), p_drop=2**-32), set()),
    "add_delta_, all sizes 1": (lambda: in_place(*problem(1, 1, 1, 1, BF16)), set()),
    "add_delta_, r 64": (lambda: in_place(*problem(512, 4096, 4096, 64, BF16)), {"_project_kernel", "_expand_kernel"}),
}


@pytest.mark.parametrize("arch", MATRIX_INSTRUCTION)
@pytest.mark.parametrize("case", CASES)
def test_budgets_and_instructions(case, arch):
    launches, on_tensor_cores = CASES[case][0](), CASES[case][1]
    for launch in launches:
        name, compiled = launch.kernel.__name__, compile_launch(launch, arch)
        compiled.assert_within_budget(arch)
        if name in on_tensor_cores:
            assert MATRIX_INSTRUCTION[arch] in compiled.tensor_core(), name
        if name == "_decode_kernel" and launch.arguments["K"] % 16 == 0:
            # W arrives in the background, 16 bytes a thread: what streaming at the memory's speed needs.
            assert "cp.async.cg.shared.global" in compiled.ptx
    assert on_tensor_cores <= {launch.kernel.__name__ for launch in launches}


@pytest.mark.parametrize("arch", MATRIX_INSTRUCTION)
def test_tf32_uses_tensor_cores_where_the_user_allows_it(arch, tf32):
    for launch in forward(*problem(4096, 4096, 4096, 64, FP32)):
        compiled = compile_launch(launch, arch)
        compiled.assert_within_budget(arch)
        assert bool(compiled.tensor_core()) == (launch.kernel.__name__ != "_rotate_kernel")


@pytest.mark.parametrize(("r", "dtype"), [(16, BF16), (64, BF16), (32, FP32)], ids=["16", "64", "32, fp32"])
def test_the_order_of_sums_does_not_depend_on_the_number_of_tokens(dtype, r):
    # What the interpreter cannot show: which instruction multiplies, and how the compiler shares out the sum of R p.
    orders = []
    for M in (1, 20, 64):
        compiled = {x.kernel.__name__: compile_launch(x, 90) for x in forward(*problem(M, 4096, 4096, r, dtype))}
        orders.append({name: (kernel.reductions(), kernel.tensor_core()) for name, kernel in compiled.items()})
    assert any(reductions for reductions, _ in orders[0].values())
    assert all(order == orders[0] for order in orders)
