"""CUDA graphs whose slots change between replays, and streams that run at the same time."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from .targets import Replay, Target, everywhere, same

SHAPES = {"decode": (48, 512, 384, 16, 32), "r64": (48, 512, 384, 64, 32), "prefill": (300, 512, 384, 16, 32)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ROUNDS = 20


def slot_patterns(M: int, S: int, device: str) -> dict[str, Tensor]:
    rows = torch.arange(M, device=device, dtype=torch.int32)
    return {
        "one adapter": torch.zeros_like(rows),
        "as many as there are": rows % S,
        "all base": torch.full_like(rows, -1),
        "skewed": torch.where(rows == 0, 0, S - 1).to(torch.int32),
        "mixed with base": rows % (S + 1) - 1,
    }


@everywhere
@shapes
@pytest.mark.parametrize("captured", ["one adapter", "all base", "as many as there are"])
def test_replay_with_other_slots_than_captured(target: Target, shape, captured):
    problem = target.problem(shape, "bf16", slots="mixed")
    patterns = slot_patterns(shape[0], shape[4], target.device)
    problem.slots = patterns[captured].clone()
    replay = Replay(lambda: target.linear(problem), target.device)
    for slots in patterns.values():
        problem.slots.copy_(slots)
        problem.x.copy_(torch.randn_like(problem.x))
        problem.pages.copy_(torch.randn_like(problem.pages))
        assert same(replay(), target.linear(replace(problem)))


@everywhere
@pytest.mark.parametrize("captured", ["one adapter", "mixed with base"])
def test_replay_of_training_with_other_slots(target: Target, captured):
    shape = SHAPES["decode"]
    problem = target.problem(shape, "bf16", slots="mixed")
    p = target.linear(problem)[1]
    patterns = slot_patterns(shape[0], shape[4], target.device)
    problem.slots = patterns[captured].clone()
    backward = target.op("linear_backward")
    replay = Replay(lambda: backward(*problem.backward_args(p)), target.device)
    for slots in patterns.values():
        problem.slots.copy_(slots)
        assert same(replay(), backward(*problem.backward_args(p)))


@everywhere
@shapes
def test_padding_of_a_captured_batch_is_inert(target: Target, shape):
    problem = target.problem(shape, "bf16", slots="mixed")
    M = shape[0]
    used = M // 3
    expected = target.linear(problem)
    replay = Replay(lambda: target.linear(problem), target.device)
    problem.slots[used:] = -1
    problem.x[used:] = torch.nan
    y, p = replay()
    assert same((y[:used], p[:used]), (expected[0][:used], expected[1][:used]))


@everywhere
@shapes
def test_two_streams_at_once_do_not_share_scratch(target: Target, shape):
    problems = [target.problem(shape, "bf16", slots="mixed", seed=seed) for seed in (1, 2)]
    expected = [target.linear(problem) for problem in problems]
    found: list[list[tuple[Tensor, ...]]] = [[], []]
    target.synchronize()

    def run(number: int) -> None:
        # One host thread a stream, so that launches interleave as two requests would.
        stream = torch.cuda.Stream() if target.on_gpu else None
        with torch.cuda.stream(stream):
            for _ in range(ROUNDS):
                found[number].append(target.linear(problems[number]))
        if stream is not None:
            stream.synchronize()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, right in zip(found, expected, strict=True):
        assert len(results) == ROUNDS and all(same(got, right) for got in results)
