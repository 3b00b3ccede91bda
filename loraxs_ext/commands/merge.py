"""`loraxs merge BASE ADAPTER OUTPUT`: fold an adapter into the weights of its base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from loraxs_ext.checkpoint import merge

from .folders import DTYPES, add_common, reported

HELP = "fold an adapter into the weights of its base model"
DESCRIPTION = """
Write the plain model W + s·B R A, which needs neither PEFT nor loraxs_ext: the shards, tokenizer and configuration of
BASE with the adapter merged into its weights, and with the heads it was trained with. One weight is held at a time,
merged in fp32 and rounded once. An adapter of another base model is refused with numbers. OUTPUT appears whole or not
at all; a call that was interrupted can be repeated. Exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong
usage.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs merge` takes."""
    parser.description = DESCRIPTION
    parser.add_argument("base", metavar="BASE", type=Path, help="folder of the base model: config.json and safetensors")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a LoRA-XS adapter")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to be made")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the result (default: that of the base)")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    return reported("merge", arguments, _merge)


def _merge(arguments: argparse.Namespace) -> tuple[str, dict[str, object]]:
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    done = merge(arguments.base, arguments.adapter, arguments.output, dtype=dtype, overwrite=arguments.overwrite)
    worst = max(done.losses, key=done.losses.__getitem__)
    lines = [
        f"{arguments.output}: {done.nbytes / 1e6:.1f} MB, {len(done.losses)} modules merged",
        f"rounding took away at most {done.losses[worst]:.2%} of an update ({worst})",
    ]
    for title, names in (("from the adapter", done.replaced), ("added", done.added)):
        if names:
            lines.append(f"{title}: {', '.join(names)}")
    facts = {"bytes": done.nbytes, "losses": done.losses, "replaced": done.replaced, "added": done.added}
    return "\n".join(lines), facts
