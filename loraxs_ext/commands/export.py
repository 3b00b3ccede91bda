"""`loraxs export BASE ADAPTER OUTPUT`: write an adapter as one that other software loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from loraxs_ext.checkpoint import export_lora

from .folders import DTYPES, add_common, reported

HELP = "write an adapter as a plain PEFT LoRA"
DESCRIPTION = """
Write a LoRA-XS adapter as a plain LoRA with the same update, lora_A = s·R A and lora_B = B, which stock PEFT and vLLM
load: of LoRA's size, because A and B are in the file. A trained magnitude makes it a DoRA. Heads come along. One base
weight is held at a time, to find the bases and to verify that the adapter belongs to it. OUTPUT appears whole or not at
all. Exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong usage.
"""
# What an adapter can be written as.
_FORMATS = {"lora": export_lora}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs export` takes."""
    parser.description = DESCRIPTION
    parser.add_argument("base", metavar="BASE", type=Path, help="folder of the base model: config.json and safetensors")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a LoRA-XS adapter")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to be made")
    parser.add_argument("--to", choices=_FORMATS, default="lora", help="format (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the factors (default %(default)s)")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    return reported("export", arguments, _export)


def _export(arguments: argparse.Namespace) -> tuple[str, dict[str, object]]:
    write = _FORMATS[arguments.to]
    folders = (arguments.base, arguments.adapter, arguments.output)
    write(*folders, dtype=DTYPES[arguments.dtype], overwrite=arguments.overwrite)
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    return f"{arguments.output}: {size / 1e6:.2f} MB", {"format": arguments.to, "bytes": size}
