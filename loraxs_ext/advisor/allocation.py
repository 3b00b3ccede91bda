"""A budget of parameters shared out among modules: which rank each gets when a rank r costs r²."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm


def allocate(values: Mapping[str, Sequence[float]], budget: int, *, progress: bool = False) -> dict[str, int]:
    """Ranks that maximise Σ_m values[m][r_m] subject to Σ_m r_m² ≤ budget.

    The exact maximum (a multiple-choice knapsack, by dynamic programming), hence at least what a greedy choice reaches,
    and deterministic: among equal sums, a smaller rank for the later module.

    Args:
        values: by module, what each rank 0 … r_max is worth; non-decreasing and 0 at rank 0.
        budget: number of parameters, at least 1.
        progress: show a bar.

    Returns:
        A rank for every module, 0 for those that are better left alone.

    Raises:
        ValueError: the budget is below 1, or a value is not finite.
    """
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 parameter, got {budget}")
    for name, worth in values.items():
        if not np.isfinite(worth).all():
            raise ValueError(f"values[{name!r}]: expected finite numbers, got {list(worth)}")
    budget = min(budget, sum((len(worth) - 1) ** 2 for worth in values.values()))
    # best[c]: the largest sum that c parameters reach in the modules so far.
    best = np.zeros(budget + 1)
    choices: dict[str, np.ndarray] = {}
    for name, worth in tqdm(values.items(), desc="allocation", unit="module", disable=not progress, leave=False):
        now = best + worth[0]
        choice = np.zeros(budget + 1, dtype=np.min_scalar_type(len(worth)))
        for rank in range(1, len(worth)):
            cost = rank * rank
            if cost > budget:
                break
            reached = best[: budget + 1 - cost] + worth[rank]
            better = reached > now[cost:]
            now[cost:][better] = reached[better]
            choice[cost:][better] = rank
        best, choices[name] = now, choice
    ranks: dict[str, int] = {}
    left = budget
    for name in reversed(list(values)):
        ranks[name] = int(choices[name][left])
        left -= ranks[name] ** 2
    return {name: ranks[name] for name in values}


def uniform_rank(ranks_max: Mapping[str, int], budget: int) -> int:
    """The largest r for which r in every module, clamped to its largest rank, costs at most the budget; 0 if none."""
    r = 0
    while r < max(ranks_max.values()) and sum(min(r + 1, most) ** 2 for most in ranks_max.values()) <= budget:
        r += 1
    return r
