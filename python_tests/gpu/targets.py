"""Whom the tests of this folder are about: every owner of the ops on a GPU, and on the CPU what computes there.

The CPU targets run everywhere. They hold the owners of the CPU to the same rules, and prove that the tests work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import owners

from ..ops.problems import DTYPES, Problem, make

# Widths and ranks that real layers have, and what goes wrong just beside them; (M, K, N, r, S).
LARGE = {
    "one token": (1, 4096, 4096, 16, 3),
    "decode": (64, 4096, 1024, 16, 64),
    "decode r64": (33, 1024, 4096, 64, 33),
    "odd widths": (37, 2049, 4097, 7, 5),
    "prefill": (600, 1024, 1536, 16, 5),
    "prefill, odd": (257, 2049, 1025, 33, 3),
    "rank 256": (140, 512, 640, 256, 2),
}
# Owners that promise bits which do not depend on how many rows there are, within one regime of M.
BATCH_INVARIANT = (owners.TRITON, owners.CUDA)


class Target(NamedTuple):
    owner: str
    device: str

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def op(self, name: str) -> Callable[..., Any]:
        """The owner's function for an op; the test is skipped where it has none, or leaves the call to others."""

        def call(*arguments: Any) -> Any:
            try:
                return owners.find(self.owner, name)(*arguments)
            except owners.NotBuilt as reason:
                pytest.skip(str(reason))

        return call

    def problem(self, shape: tuple[int, int, int, int, int], dtype: str, **options: Any) -> Problem:
        """As `problems.make`, on the device and in the layout of the owner."""
        problem = place(make(shape, DTYPES[dtype], **options), self.device)
        if self.owner == owners.CONCATENATED:
            try:
                problem.weight, problem.b = owners.laid_out(self.owner, problem.weight, problem.b)
            except owners.NotBuilt as reason:
                pytest.skip(str(reason))
        return problem

    def linear(self, p: Problem) -> tuple[Tensor, Tensor]:
        return self.op("linear")(*p.forward_args())

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


ON_CPU = [Target(name, "cpu") for name in (owners.DISPATCHER, owners.PLAIN_TORCH)]
ON_GPU = [Target(name, "cuda") for name in owners.OWNERS]


def _parameters(targets: list[Target]) -> list[Any]:
    return [
        pytest.param(t, id=f"{t.owner.replace(' ', '-')}-{t.device}", marks=[pytest.mark.gpu] if t.on_gpu else [])
        for t in targets
    ]


everywhere = pytest.mark.parametrize("target", _parameters([*ON_CPU, *ON_GPU]))
on_gpu = pytest.mark.parametrize("target", _parameters(ON_GPU))


def place(problem: Problem, device: str) -> Problem:
    """The problem on another device; the basis keeps its layout."""
    moved = {f.name: getattr(problem, f.name) for f in fields(problem)}
    return replace(problem, **{name: t.to(device) for name, t in moved.items() if isinstance(t, Tensor)})


class Replay:
    """A call whose inputs may change in place between runs: a CUDA graph on a GPU, the call itself on the CPU."""

    def __init__(self, call: Callable[[], tuple[Tensor, ...]], device: str) -> None:
        self._call = call
        self._graph = torch.cuda.CUDAGraph() if device == "cuda" else None
        if self._graph is None:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph):
            self._outputs = call()

    def __call__(self) -> tuple[Tensor, ...]:
        """Copies of the outputs of one more run; what it did not write is NaN."""
        if self._graph is None:
            return self._call()
        for output in self._outputs:
            output.fill_(torch.nan)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Equal to the last bit, and no NaN among them."""
    return all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
