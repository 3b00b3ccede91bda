"""What the commands that turn folders into folders have in common: arguments, and one way to fail."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable

import torch
from safetensors import SafetensorError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_common(parser: argparse.ArgumentParser) -> None:
    """--overwrite and --json."""
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is a model or an adapter")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def reported(
    command: str, arguments: argparse.Namespace, work: Callable[[argparse.Namespace], tuple[str, dict[str, object]]]
) -> int:
    """Do the work and print what it returns, as text or JSON; warnings and failures are a line each on stderr.

    Returns:
        The exit status.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for kind in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            text, facts = work(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError) as reason:
        print(f"loraxs {command}: {reason}", file=sys.stderr)
        return 1
    told = list(dict.fromkeys(str(warning.message) for warning in caught))
    for message in told:
        print(f"loraxs {command}: warning: {message}", file=sys.stderr)
    print(
        json.dumps({"output": str(arguments.output), **facts, "warnings": told}, indent=2) if arguments.json else text
    )
    return 0
