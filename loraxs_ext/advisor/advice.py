"""From gradients to advice: the best ranks for a budget, what they promise over one rank for all, and which to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from loraxs_ext.peft import LoraXSConfig

from .allocation import allocate, uniform_rank
from .gradients import GRADIENT_MEMORY, Batch, Loss, ModuleGradient, measure, model_loss
from .patterns import with_ranks

# Whether ranks that promise more gained energy are recommended. In benchmarks/advice.py (three tasks, 2,304 and 9,216
# parameters, 3 seeds) they held 1.7 to 2.4 times as much of it, and test accuracy differed by -1.8 ± 0.5 to +1.5 ± 0.8
# points, to their disadvantage in four of six cases.
FOLLOW_GRADIENTS = False

Choice = Literal["uniform", "advised"]


@dataclass(frozen=True)
class Advice:
    """What was measured, and what follows.

    Attributes:
        modules: the gradients, in the order of the model.
        budget: parameters that all R together may have.
        uniform: rank of every module if all get the same, the largest that the budget allows.
        advised: rank of every module if ranks follow the gradients.
        promise: gained energy of the advised ranks over that of the uniform ones, minus 1: ranks chosen on one half of
            the calibration data, measured on the other, both ways round.
        uniform_config, advised_config: the same as configurations; no uniform one if the budget is less than one
            parameter a module.
    """

    modules: tuple[ModuleGradient, ...]
    budget: int
    uniform: dict[str, int]
    advised: dict[str, int]
    promise: tuple[float, float]
    uniform_config: LoraXSConfig | None
    advised_config: LoraXSConfig

    @property
    def gain(self) -> float:
        """Mean of the two promises."""
        return sum(self.promise) / 2

    @property
    def spread(self) -> float:
        """Difference of the two promises: how far one half of the calibration data is from the other."""
        return abs(self.promise[0] - self.promise[1])

    @property
    def stands_out(self) -> bool:
        """Whether the gain is larger than the spread."""
        return self.gain > self.spread

    @property
    def recommended(self) -> Choice:
        """Which ranks to use."""
        if self.uniform_config is None or (FOLLOW_GRADIENTS and self.stands_out):
            return "advised"
        return "uniform"


RANK_MAX = 32


def advise(
    model: nn.Module,
    batches: Sequence[Batch],
    budget: int,
    config: LoraXSConfig,
    *,
    rank_max: int = RANK_MAX,
    loss: Loss = model_loss,
    gradient_memory: int = GRADIENT_MEMORY,
    progress: bool = True,
) -> Advice:
    """Which rank each module should get so that all R together have at most `budget` parameters.

    Args:
        model: without adapters, with a head that fits the task (`fit_head`); it is left as it was.
        batches: calibration data, at least two; some hundred rows in all.
        budget: parameters, Σ r².
        config: targets, scaling and recipe of the adapter that is to be trained.
        rank_max: largest rank of a module.
        loss, gradient_memory, progress: see `measure`.

    Raises:
        ValueError: the budget is below 1; or see `measure`.
    """
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 parameter, got {budget}")
    modules = measure(model, batches, config, rank_max, loss=loss, gradient_memory=gradient_memory, progress=progress)
    return decide(modules, budget, config, progress=progress)


def decide(modules: Sequence[ModuleGradient], budget: int, config: LoraXSConfig, *, progress: bool = False) -> Advice:
    """The advice that follows from gradients which were measured before; see `advise`."""
    most = {module.name: module.rank_max for module in modules}
    rank = uniform_rank(most, budget)
    same = {name: min(rank, largest) for name, largest in most.items()}
    whole = {module.name: module.gained() for module in modules}
    halves = [{module.name: module.gained(half) for module in modules} for half in (0, 1)]
    chosen = [allocate(half, budget, progress=progress) for half in halves]
    promise = [
        _total(half, ranks) / (_total(half, same) or 1.0) - 1 for half, ranks in zip(halves, chosen[::-1], strict=True)
    ]
    advised = allocate(whole, budget, progress=progress)
    return Advice(
        tuple(modules), budget, same, advised, (promise[0], promise[1]),
        with_ranks(config, same) if rank else None, with_ranks(config, advised),
    )  # fmt: skip


def _total(values: Mapping[str, Sequence[float]], ranks: Mapping[str, int]) -> float:
    return sum(values[name][rank] for name, rank in ranks.items())
