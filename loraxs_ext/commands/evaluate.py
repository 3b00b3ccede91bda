"""`loraxs eval CONFIG.yaml`: what a trained adapter, or the base model alone, makes of the test rows."""

from __future__ import annotations

import argparse
from typing import Any

from loraxs_ext.training import read_run

from .train import add_common_arguments, report

HELP = "evaluate a trained adapter from the same YAML file"
DESCRIPTION = """
Evaluate what `loraxs train CONFIG.yaml` trained on data.test. Classification prints metrics and writes
predictions.jsonl; instruction tuning generates answers, checks them, and writes answers.jsonl row by row, so that the
same command goes on after an interruption. Exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong usage.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs eval` takes."""
    parser.description = DESCRIPTION
    parser.add_argument("config", metavar="CONFIG.yaml", help="as given to loraxs train")
    parser.add_argument("--base", action="store_true", help="the model without its adapter (instruction tuning)")
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    return report("eval", arguments, _evaluate)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = read_run(arguments.config, dict(arguments.overrides))
    from loraxs_ext.training.evaluate import evaluate

    return evaluate(settings, base=arguments.base)
