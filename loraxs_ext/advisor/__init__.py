"""Which rank each module of a model should get for a budget of parameters, from one backward pass at R = 0.

The gradient of R tells how fast the loss would fall if the adapter could move in each direction. That is a diagnosis
at the start of training, not a forecast of its end: see `Advice`.
"""

from __future__ import annotations

from .advice import RANK_MAX, Advice, Choice, advise, decide
from .allocation import allocate, uniform_rank
from .calibration import Subject, Texts, batches_of, fit_head, load, read_texts
from .gradients import GRADIENT_MEMORY, ModuleGradient, measure, model_loss
from .patterns import snippet, with_ranks
from .report import explain, table, to_dict

__all__ = [
    "GRADIENT_MEMORY",
    "RANK_MAX",
    "Advice",
    "Choice",
    "ModuleGradient",
    "Subject",
    "Texts",
    "advise",
    "allocate",
    "batches_of",
    "decide",
    "explain",
    "fit_head",
    "load",
    "measure",
    "model_loss",
    "read_texts",
    "snippet",
    "table",
    "to_dict",
    "uniform_rank",
    "with_ranks",
]
