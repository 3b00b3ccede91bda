"""loraxs::_linear_decode on a GPU: every kernel that its generation has, graphs, streams, batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraxs_ext.ops import decode, reference

from .problems import DTYPES, Problem, assert_within_twice, make, naive_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# (M, K, N, r, S); K = 1000 and 4104 end within a chunk, N = 1001 within a tile and off 8 bytes.
SHAPES = {
    "one token": (1, 4096, 4096, 16, 1),
    "8 tokens, odd sizes": (8, 1000, 1001, 7, 9),
    "16 tokens, rank 32": (16, 4096, 1024, 32, 16),
    "30 tokens": (30, 4104, 1032, 16, 30),
    "64 tokens": (64, 4096, 14336, 16, 64),
    "two kernels, 5 tokens": (5, 14336, 4096, 64, 5),
    "two kernels, 33 tokens": (33, 4104, 1001, 100, 7),
    "two kernels, 128 tokens": (128, 4096, 4096, 128, 128),
}


def on_gpu(problem: Problem) -> Problem:
    for name, value in vars(problem).items():
        if isinstance(value, Tensor):
            setattr(problem, name, value.mT.contiguous().cuda().mT if name == "b" else value.cuda())
    return problem


def compute(p: Problem) -> tuple[Tensor, Tensor]:
    if not decode.takes(p.x, p.weight, p.a, 0.0):
        pytest.skip("this GPU's generation leaves these sizes to another owner")
    return torch.ops.loraxs._linear_decode(*p.forward_args())


@pytest.mark.parametrize("slots", [None, "mixed", "base", "skewed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_within_twice_plain_torch(dtype, shape, slots):
    problem = on_gpu(make(SHAPES[shape], DTYPES[dtype], slots=slots))
    y, p = compute(problem)
    exact = problem.to(torch.float64)
    expected_y, expected_p = reference.linear(*exact.forward_args())
    assert_within_twice(y, naive_linear(problem), expected_y, "y")
    assert_within_twice(p, reference.linear(*problem.forward_args())[1], expected_p, "p")
    for again in (compute(problem) for _ in range(5)):
        assert torch.equal(again[0], y) and torch.equal(again[1], p)


@pytest.mark.parametrize("shape", [(60, 4096, 4096, 16, 60), (60, 1000, 1001, 9, 3), (100, 4096, 1024, 40, 8)], ids=str)
def test_a_row_does_not_depend_on_its_batch(shape):
    whole = on_gpu(make(shape, torch.bfloat16, slots="mixed"))
    y, p = compute(whole)
    for M in (1, 9, 17, 33):
        part = on_gpu(make(shape, torch.bfloat16, slots="mixed"))
        part.x, part.slots = whole.x[-M:], whole.slots[-M:]
        part_y, part_p = compute(part)
        if shape[3] <= 16 or M > 16:  # with more ranks, 16 tokens are the other kernel's
            assert torch.equal(part_y, y[-M:]) and torch.equal(part_p, p[-M:])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_replays_with_other_slots(shape):
    problem = on_gpu(make(SHAPES[shape], torch.bfloat16, slots="mixed"))
    compute(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = compute(problem)
    for seed in range(3):
        other = make(SHAPES[shape], torch.bfloat16, slots="mixed", seed=seed)
        problem.slots.copy_(other.slots)
        problem.x.copy_(other.x)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, compute(problem)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_streams_do_not_share_scratch(shape):
    problems = [on_gpu(make(SHAPES[shape], torch.bfloat16, slots="mixed", seed=seed)) for seed in range(2)]
    expected = [compute(problem)[0] for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for problem, stream, got in zip(problems, streams, results, strict=True):
            with torch.cuda.stream(stream):
                got.append(compute(problem)[0])
    torch.cuda.synchronize()
    for want, got in zip(expected, results, strict=True):
        assert all(torch.equal(want, y) for y in got)
