"""The compiled CPU ops give the same bits whatever the thread count and the split of the work."""

from __future__ import annotations

import pytest
import torch

from loraxs_ext import ops

from .problems import DTYPES, make, threads

if not ops.backends.COMPILED:
    pytest.skip("the compiled ops are not built", allow_module_level=True)

# Large enough to leave the inline path: rows dealt out to threads; ranks and columns dealt out; both with remainders.
SHAPES = {"rows": (130, 320, 200, 20, 4), "columns": (5, 2049, 3000, 40, 3)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p_drop", [0.0, 0.2])
def test_thread_count_does_not_change_a_bit(dtype, shape, p_drop):
    problem = make(SHAPES[shape], DTYPES[dtype], slots="mixed", p_drop=p_drop)
    # Without a weight everything is decided by the op itself.
    backward = (problem.dy, None, *problem.low_rank_args()[:4])

    def run(count: int) -> tuple[torch.Tensor, ...]:
        with threads(count):
            out, p = torch.ops.loraxs.add_delta(problem.dy, problem.x, *problem.low_rank_args())
            grads = torch.ops.loraxs.linear_backward(
                *backward, p, problem.scale, problem.p_drop, problem.rng, True, True
            )
            return out, p, *grads

    alone = run(1)
    for count in (2, 3, 7):
        for name, one, many in zip(("out", "p", "dx", "dpages"), alone, run(count), strict=True):
            assert torch.equal(one, many), f"{name} differs between 1 and {count} threads"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_mixed_batch_is_its_rows(dtype):
    # Runs of one slot and single rows take different paths through the r x r step.
    problem = make((96, 64, 48, 16, 4), DTYPES[dtype])
    runs = torch.tensor([0] * 40 + [1, 2, 3, -1] * 4 + [2] * 40, dtype=torch.int32)
    args = (problem.dy, problem.x, problem.a, problem.b, problem.pages)
    together, _ = torch.ops.loraxs.add_delta(*args, runs, problem.scale)
    for slot in range(4):
        every_row, _ = torch.ops.loraxs.add_delta(*args, torch.full_like(runs, slot), problem.scale)
        rows = runs == slot
        torch.testing.assert_close(together[rows], every_row[rows])
    assert torch.equal(together[runs < 0], problem.dy[runs < 0])


def test_called_from_several_threads_at_once():
    # Tile state belongs to a thread, and these are not torch's own.
    from concurrent.futures import ThreadPoolExecutor

    problem = make((130, 320, 200, 20, 4), torch.bfloat16, slots="mixed")
    expected = torch.ops.loraxs.add_delta(problem.dy, problem.x, *problem.low_rank_args())[0]
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(torch.ops.loraxs.add_delta, problem.dy, problem.x, *problem.low_rank_args()) for _ in range(8)
        ]
        assert all(torch.equal(f.result()[0], expected) for f in futures)


def test_in_place_on_a_strided_output():
    problem = make((24, 40, 36, 8, 3), slots="mixed")
    strided = torch.zeros(36, 24).T
    strided.copy_(problem.dy)
    expected, _ = torch.ops.loraxs.add_delta(problem.dy, problem.x, *problem.low_rank_args())
    torch.ops.loraxs.add_delta_(strided, problem.x, *problem.low_rank_args())
    assert torch.equal(strided, expected)


def test_no_graph_is_recorded_inside():
    problem = make((4, 40, 36, 8, 3))
    problem.weight.requires_grad_()
    with torch._C._AutoDispatchBelowAutograd():
        y, p = torch.ops.loraxs.linear(*problem.forward_args())
    assert not y.requires_grad and not p.requires_grad
