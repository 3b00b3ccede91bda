"""Training on the Hugging Face Trainer: classification as in GLUE, and instruction tuning with checked answers.

`make_run` and `read_run` check a configuration; `loraxs_ext.training.train.train` and
`loraxs_ext.training.evaluate.evaluate` carry it out. Those two import the Trainer, this package does not.
"""

from __future__ import annotations

from .commented import commented_yaml
from .presets import PRESETS, Choice, Preset
from .settings import TASKS, ClassificationRun, InstructionRun, Run, make_run, read_run

__all__ = [
    "PRESETS", "TASKS", "Choice", "ClassificationRun", "InstructionRun", "Preset", "Run", "commented_yaml", "make_run",
    "read_run",
]  # fmt: skip
