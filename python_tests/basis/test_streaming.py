from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from loraxs_ext.basis.streaming import Stager, chunk_bytes, prefetched

from .matrices import gaussian

CPU = torch.device("cpu")


def test_order_and_thread() -> None:
    threads = set()

    def items() -> Iterator[int]:
        for i in range(20):
            threads.add(threading.current_thread())
            yield i

    assert list(prefetched(items())) == list(range(20))
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_one_item_ahead_and_no_more() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(6):
            made.append(i)
            yield i

    for item in prefetched(items()):
        deadline = time.monotonic() + 5
        while len(made) < min(item + 2, 6) and time.monotonic() < deadline:
            time.sleep(1e-3)
        # Long enough for a second item ahead, if anything made one.
        time.sleep(2e-3)
        assert made == list(range(min(item + 2, 6)))


def test_what_an_item_raises_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    source = prefetched(items())
    assert next(source) == 1
    with pytest.raises(OSError, match="no more"):
        next(source)


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    source = prefetched(iter(range(100)))
    assert next(source) == 0
    source.close()
    assert threading.active_count() == before


def test_nothing_at_all() -> None:
    assert list(prefetched(iter(()))) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_stacks(dtype: torch.dtype) -> None:
    weights = [gaussian(5, 7, seed=i).to(dtype) for i in range(3)]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    stack = Stager(CPU).stack(weights, exact).wait()
    assert stack.dtype == exact and torch.equal(stack, torch.stack(weights).to(exact))


def test_room_is_used_again_only_where_it_fits() -> None:
    stager = Stager(CPU, reuse=True)
    room = stager.stack([gaussian(5, 7), gaussian(5, 7, seed=1)], torch.float32).wait().data_ptr()
    for shape, count, dtype in [((5, 7), 2, torch.float32), ((1, 7), 2, torch.float32), ((5, 7), 3, torch.float64)]:
        weights = [gaussian(*shape, seed=i) for i in range(count)]
        stack = stager.stack(weights, dtype).wait()
        assert stack.dtype == dtype and torch.equal(stack, torch.stack(weights).to(dtype))
        assert (stack.data_ptr() == room) == (shape == (5, 7) and dtype == torch.float32)


def test_a_single_weight_is_not_copied() -> None:
    weight = gaussian(5, 7)
    assert Stager(CPU).stack([weight], torch.float32).wait().data_ptr() == weight.data_ptr()


def test_a_cpu_takes_what_stays_in_its_caches() -> None:
    assert 1 << 20 <= chunk_bytes(CPU) <= 1 << 26
