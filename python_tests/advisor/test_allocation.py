"""The allocation against brute force, and what it promises: the budget, determinism, order."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from loraxs_ext.advisor import allocate, uniform_rank

Values = dict[str, list[float]]


def random_values(seed: int, ranks: tuple[int, ...], concave: bool = False) -> Values:
    """Non-decreasing values of every rank."""
    random = np.random.default_rng(seed)
    found = {}
    for i, most in enumerate(ranks):
        steps = random.random(most) ** 3
        found[f"m{i}"] = [0.0, *np.cumsum(np.sort(steps)[::-1] if concave else steps).tolist()]
    return found


def worth(values: Values, ranks: dict[str, int]) -> float:
    return sum(values[name][rank] for name, rank in ranks.items())


def cost(ranks: dict[str, int]) -> int:
    return sum(rank**2 for rank in ranks.values())


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_budget_is_better(seed: int) -> None:
    values = random_values(seed, (4, 3, 5, 2))
    choices = [
        dict(zip(values, ranks, strict=True)) for ranks in product(*(range(len(worths)) for worths in values.values()))
    ]
    for budget in range(1, 60):
        best = max(worth(values, ranks) for ranks in choices if cost(ranks) <= budget)
        found = allocate(values, budget)
        assert cost(found) <= budget
        assert worth(values, found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("budget", [1, 2, 100, 2304, 9216, 9217])
def test_the_budget_is_never_exceeded_and_well_used(budget: int) -> None:
    values = random_values(0, (48,) * 36, concave=True)
    found = allocate(values, budget)
    # Every value grows with the rank, and a module of rank 0 costs a single parameter more.
    assert list(found) == list(values) and budget - 2 * max(found.values()) - 1 < cost(found) <= budget
    assert found == allocate(values, budget)


def test_ties_go_to_the_earlier_module() -> None:
    assert allocate({"a": [0.0, 1.0], "b": [0.0, 1.0], "c": [0.0, 1.0]}, 2) == {"a": 1, "b": 1, "c": 0}


def test_what_is_worth_nothing_costs_nothing() -> None:
    assert allocate({"a": [0.0, 1.0, 1.0], "b": [0.0, 0.0]}, 100) == {"a": 1, "b": 0}
    assert allocate({"a": [0.0, 0.0]}, 1) == {"a": 0}


def test_a_budget_for_everything_gives_everything() -> None:
    assert allocate({"a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0, 3.0]}, 10**12) == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    ("most", "budget", "expected"),
    [
        ({"a": 9, "b": 9}, 7, 1),
        ({"a": 9, "b": 9}, 8, 2),
        ({"a": 2, "b": 9}, 4 + 9, 3),
        ({"a": 2, "b": 9}, 10**9, 9),
        ({"a": 9, "b": 9}, 1, 0),
    ],
)
def test_uniform_rank(most: dict[str, int], budget: int, expected: int) -> None:
    assert uniform_rank(most, budget) == expected


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="budget: expected at least 1 parameter, got 0"):
        allocate({"a": [0.0, 1.0]}, 0)
    with pytest.raises(ValueError, match=r"values\['a'\]: expected finite numbers"):
        allocate({"a": [0.0, float("nan")]}, 1)
