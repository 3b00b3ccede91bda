"""How benchmarks alternate: nobody may gain from its place or its neighbour."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice, pairwise

import pytest

from benchmarks._measure import MIN_ROUNDS, alternate, ratio, turns


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_places_and_neighbours_are_balanced(n):
    names = [f"provider {i}" for i in range(n)]
    rows = n * (1 + n % 2)
    orders = list(islice(turns(names, random.Random(0)), 2 * rows))
    for block in (orders[:rows], orders[rows:]):
        assert all(sorted(order) == names for order in block)
        for place in range(n):
            assert set(Counter(order[place] for order in block).values()) == {rows // n}
        neighbours = Counter(pair for order in block for pair in pairwise(order))
        assert len(neighbours) == n * (n - 1)
        assert set(neighbours.values()) == {rows // n}


def test_every_round_has_a_sample_of_everybody():
    calls = Counter()
    ticks = {"slow": 0.5, "fast": 0.25}
    providers = {name: lambda name=name: calls.update([name]) for name in ticks}

    def stopwatch(call, repeat):
        before = calls.copy()
        for _ in range(repeat):
            call()
        return sum(ticks[name] * count for name, count in (calls - before).items())

    samples = alternate(providers, 0.0, stopwatch)
    assert {name: set(times) for name, times in samples.items()} == {"slow": {0.5}, "fast": {0.25}}
    assert {len(times) for times in samples.values()} == {MIN_ROUNDS}
    assert ratio(samples, "slow", "fast") == 2
