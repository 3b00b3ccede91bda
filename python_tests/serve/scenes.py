"""A model with a pool beside the PEFT model that the adapters come from, which is the oracle."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from loraxs_ext.serve import AdapterPool

from ..peft.models import Case
from .sources import shelf_of

# "wide" has another rank and scaling, "narrow" lacks modules.
NAMES = ["plain", None, "wide", "narrow"]


class Scene:
    """Three adapters that differ in rank, scaling and modules, in a pool with a slot each.

    Attributes:
        case: the architecture.
        oracle: PEFT model with the adapters.
        base: the same base model without any of that.
        model: another copy of it, with a pool.
        shelf: source of the pool.
    """

    def __init__(self, case: Case, **options) -> None:
        self.case = case
        config = case.config(init_seed=1)
        self.oracle = case.model()
        self.oracle.add_adapter("wide", case.config(r=6, init_seed=2, lora_alpha=3))
        self.oracle.add_adapter("narrow", case.config(r=3, init_seed=3, target_modules=[case.targets[0]]))
        self.oracle.add_adapter("plain", config)
        self.oracle.eval()
        self.shelf = shelf_of(self.oracle, ["plain", "wide", "narrow"])
        self.base, self.model = case.base(), case.base()
        self.pool = AdapterPool(self.model, self.shelf, **{"slots": 3, **options})

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.close()

    def alone(self, name: str | None):
        """The model that serves this adapter and nothing else, without any routing."""
        if name is None:
            return self.base
        self.oracle.set_adapter(name)
        return self.oracle

    def ids(self, rows: int = len(NAMES), length: int = 6) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(2, 50, (rows, length), generator=generator)
