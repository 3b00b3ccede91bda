"""`loraxs pack STORE DIR…`: put adapter folders into a store."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from loraxs_ext.checkpoint.packing import find_adapters, manifest_of, pack
from loraxs_ext.store import AdapterStore, Manifest

from .folders import DTYPES

HELP = "put adapter folders into a store"
DESCRIPTION = """
Find the LoRA-XS and TinyLoRA adapters at and below the folders, and put them into an adapter store under their paths
as names. A store that does not exist is made for the basis, targets and ranks of the first adapter, or that of --like;
adapters of another basis, of higher ranks, or with more than R's are reported and skipped. What is in the store with
the same content is left alone, so an interrupted run goes on where it was. Exit status: 0 all are in the store, 1 some
or all are not (the reasons are on stderr), 2 wrong usage.
"""
_DTYPES = {**DTYPES, "int8": torch.int8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs pack` takes."""
    parser.description = DESCRIPTION
    parser.add_argument("store", metavar="STORE", type=Path, help="folder of the store; made if it does not exist")
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="adapters, or folders of them")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the numbers stored (default %(default)s)")
    parser.add_argument("--prefix", default="", help="of the names, such as team/")
    parser.add_argument("--jobs", type=int, default=4, help="threads that read folders (default %(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at the first adapter that is refused")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")
    new = parser.add_argument_group("for a new store")
    new.add_argument("--like", metavar="DIR", type=Path, help="adapter with the store's basis, targets and ranks")
    new.add_argument("--keep", type=int, metavar="N", help="versions of an adapter to keep (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    try:
        if arguments.jobs < 1:
            raise ValueError(f"--jobs: expected at least 1, got {arguments.jobs}")
        with ExitStack() as stack:
            counts = _pack(arguments, stack)
    except (ValueError, TypeError, OSError, ImportError) as reason:
        print(f"loraxs pack: {reason}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"store": str(arguments.store), **counts}, indent=2))
    else:
        would = "would be " if arguments.dry_run else ""
        print(f"{arguments.store}: " + ", ".join(f"{count} {would}{outcome}" for outcome, count in counts.items()))
    return 1 if counts["refused"] else 0


def _pack(arguments: argparse.Namespace, stack: ExitStack) -> dict[str, int]:
    folders = find_adapters(arguments.folders, arguments.prefix)
    if not folders:
        raise ValueError(f"expected adapters below {', '.join(map(str, arguments.folders))}, got none")
    store = _open(arguments, folders, stack)
    counts: Counter[str] = Counter()
    options = {"dtype": _DTYPES[arguments.dtype], "jobs": arguments.jobs, "strict": arguments.strict}
    with tqdm(total=len(folders), desc="pack", unit="adapter") as bar:
        for packed in pack(store, folders, **options, dry_run=arguments.dry_run):
            counts[packed.outcome] += 1
            if packed.reason is not None:
                bar.write(f"loraxs pack: {packed.name!r} was refused: {packed.reason}", file=sys.stderr)
            bar.update()
    return {outcome: counts[outcome] for outcome in ("added", "replaced", "unchanged", "refused")}


def _open(arguments: argparse.Namespace, folders: Mapping[str, Path], stack: ExitStack) -> AdapterStore:
    """The store; a new one for a dry run where there is none yet is thrown away."""
    if arguments.store.exists():
        for option in ("like", "keep"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--{option}: expected for a new store only, and {arguments.store} exists")
        return stack.enter_context(AdapterStore(arguments.store, readonly=arguments.dry_run))
    manifest = _manifest([arguments.like] if arguments.like else list(folders.values()))
    path = arguments.store
    if arguments.dry_run:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "store"
    return stack.enter_context(
        AdapterStore.create(path, manifest, keep=1 if arguments.keep is None else arguments.keep)
    )


def _manifest(folders: list[Path]) -> Manifest:
    """Of the first folder that has one."""
    reasons = []
    for folder in folders:
        try:
            return manifest_of(folder)
        except (OSError, ValueError, TypeError) as reason:
            reasons.append(str(reason))
    raise ValueError(
        f"expected an adapter of nothing but R to make a store for, got none of {len(folders)}: {reasons[0]}"
    )
