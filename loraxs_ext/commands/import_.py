"""`loraxs import BASE FOLDER OUTPUT`: turn an adapter of another kind into a LoRA-XS adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from loraxs_ext.checkpoint import import_lora
from loraxs_ext.checkpoint.importing import KINDS, detect, import_loaded
from loraxs_ext.checkpoint.projection import DEFAULT_THRESHOLD
from loraxs_ext.peft import LoraXSConfig

from .folders import add_common, reported

HELP = "turn an adapter of another kind into a LoRA-XS adapter"
DESCRIPTION = """
Read a plain PEFT LoRA, a checkpoint of the reference implementation or a PEFT TinyLoRA in safetensors, and write a
LoRA-XS adapter. A LoRA is projected on the basis, one base weight at a time; a trained LoRA lies mostly outside of it,
so what is lost is reported, and refused above --threshold. The other kinds are exact, and load the base model as a
whole. OUTPUT appears whole or not at all. Exit status: 0 done, 1 failed (the reason is on stderr), 2 wrong usage.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs import` takes."""
    parser.description = DESCRIPTION
    parser.add_argument("base", metavar="BASE", type=Path, help="folder of the base model: config.json and safetensors")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the adapter")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to be made")
    kinds = ("auto", *KINDS)
    parser.add_argument(
        "--from", dest="kind", choices=kinds, default="auto", help="kind of adapter (default: detected)"
    )
    lora = parser.add_argument_group("for a LoRA")
    lora.add_argument("--rank", type=int, help=f"of the LoRA-XS adapter (default {LoraXSConfig.r})")
    lora.add_argument(
        "--threshold", type=float,
        help=f"largest accepted residual ‖ΔW − s·B R A‖ / ‖ΔW‖, 1 for any (default {DEFAULT_THRESHOLD})",
    )  # fmt: skip
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    return reported("import", arguments, _import)


def _import(arguments: argparse.Namespace) -> tuple[str, dict[str, object]]:
    kind = detect(arguments.folder) if arguments.kind == "auto" else arguments.kind
    folders = (arguments.base, arguments.folder, arguments.output)
    if kind != "lora":
        for name in ("rank", "threshold"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name}: expected for a LoRA only, got one for an adapter of kind {kind}")
        import_loaded(*folders, kind, overwrite=arguments.overwrite)
        return f"{arguments.output}: imported from {kind}", {"kind": kind}
    rank = LoraXSConfig.r if arguments.rank is None else arguments.rank
    threshold = DEFAULT_THRESHOLD if arguments.threshold is None else arguments.threshold
    config = LoraXSConfig(r=rank, lora_alpha=rank)
    projection = import_lora(*folders, config, threshold=threshold, overwrite=arguments.overwrite)
    facts = {"kind": kind, "residual": projection.residual, "modules": [m._asdict() for m in projection.modules]}
    return f"{arguments.output}: imported from {kind}; {projection}", facts
