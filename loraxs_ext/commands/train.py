"""`loraxs train CONFIG.yaml`: fine-tune a classifier or a language model, and go on after an interruption."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from typing import Any

from safetensors import SafetensorError

from loraxs_ext.training import PRESETS, TASKS, commented_yaml, read_run
from loraxs_ext.training.settings import import_yaml

HELP = "train an adapter from a YAML file"
DESCRIPTION = """
Train a LoRA-XS adapter on the Hugging Face Trainer: a classifier on labelled texts, or a language model on prompts and
responses. The same command goes on from the last checkpoint of the output folder after an interruption, and does
nothing where the run is finished. Paths are relative to the working directory. Exit status: 0 done, 1 failed (the
reason is on stderr), 2 wrong usage.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs train` takes."""
    parser.description = DESCRIPTION
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="what to train, on what, and how")
    what.add_argument(
        "--print-config", choices=[*PRESETS, *TASKS], metavar="PRESET",
        help=f"print a commented CONFIG.yaml and stop; one of {', '.join([*PRESETS, *TASKS])}",
    )  # fmt: skip
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs train` and `loraxs eval` both take."""
    parser.add_argument(
        "--set", dest="overrides", metavar="FIELD=VALUE", action="append", default=[], type=_override,
        help="override a field, such as training.lr=1e-3; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    if arguments.print_config:
        print(commented_yaml(arguments.print_config), end="")
        return 0
    return report("train", arguments, _train)


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = read_run(arguments.config, dict(arguments.overrides))
    # Late: the Trainer takes seconds to import, and a mistyped field is answered at once.
    from loraxs_ext.training.train import train

    return train(settings)


def report(command: str, arguments: argparse.Namespace, work: Any) -> int:
    """Run `work`, print what it returns, and turn errors that a user can act on into one line; the exit status."""
    try:
        # The Trainer prints its log; standard output is for the result alone.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.showwarning = _one_line
            outcome = work(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError) as reason:
        print(f"loraxs {command}: {reason}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") != "0":
        # One of several processes that torchrun or accelerate started: the first one speaks for all.
        return 0
    print(json.dumps(outcome, indent=2, ensure_ascii=False) if arguments.json else as_text(outcome))
    return 0


def as_text(outcome: dict[str, Any]) -> str:
    """One line a field."""
    lines = []
    for name, value in outcome.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        lines.append(f"{name.replace('_', ' '):<16}{_short(value)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _one_line(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    # Other libraries' warnings about their own insides are not for the user of a command.
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        print(f"warning: {message}", file=sys.stderr)


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    yaml = import_yaml()
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{name}: expected a YAML value, got {value!r}") from error
