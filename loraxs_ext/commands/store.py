"""`loraxs store list|info|check|compact|delete|export STORE …`: look after an adapter store."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from loraxs_ext.checkpoint.packing import unpack
from loraxs_ext.store import AdapterStore

HELP = "list, check, compact, delete from and export an adapter store"
DESCRIPTION = """
Look after a store that `loraxs pack` made. All but `delete` only read, also while another process writes. Exit status:
0 done, 1 failed or damaged (the reason is on stderr), 2 wrong usage.
"""

# Of a file's name, less what a temporary one adds.
_LONGEST = 230


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `loraxs store` takes."""
    parser.description = DESCRIPTION
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=help, description=help.capitalize() + ".")
        added.add_argument("store", metavar="STORE", type=Path, help="folder of the store")
        if name != "delete":
            added.add_argument("--no-lock", action="store_true", help="for a read-only folder that nobody writes to")
        return added

    for name, help in (("list", "print the names of adapters"), ("export", "write adapters as folders for PEFT")):
        added = action(name, help)
        added.add_argument("--prefix", default="", help="only names that begin with it")
        if name == "list":
            added.add_argument("--after", help="only names beyond this one")
            added.add_argument("--limit", type=int, help="at most so many")
            added.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
        else:
            added.add_argument("output", metavar="OUTPUT", type=Path, help="folder for a folder by adapter")
            added.add_argument("names", metavar="NAME", nargs="*", help="adapters (default: all with the prefix)")
            added.add_argument("--overwrite", action="store_true", help="replace adapters that are there")
    action("info", "print the basis, the options and the size").add_argument("--json", action="store_true")
    action("check", "decode every record and compare what belongs together")
    compacted = action("compact", "write a copy without free pages")
    compacted.add_argument("output", metavar="OUTPUT", type=Path, help="folder to be made")
    action("delete", "forget adapters").add_argument("names", metavar="NAME", nargs="+", help="of an adapter")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    writes = arguments.action == "delete"
    try:
        with AdapterStore(arguments.store, readonly=not writes, lock=writes or not arguments.no_lock) as store:
            return _ACTIONS[arguments.action](store, arguments)
    except (ValueError, TypeError, OSError, ImportError) as reason:
        print(f"loraxs store: {reason}", file=sys.stderr)
    except KeyError as reason:
        print(f"loraxs store: {reason.args[0]}", file=sys.stderr)
    return 1


def _list(store: AdapterStore, arguments: argparse.Namespace) -> int:
    if arguments.limit is not None and arguments.limit < 0:
        raise ValueError(f"--limit: expected 0 or more, got {arguments.limit}")
    names = store.names(arguments.prefix, arguments.after, arguments.limit)
    if arguments.json:
        print(json.dumps(list(names), indent=2))
    else:
        for name in names:
            print(name)
    return 0


def _info(store: AdapterStore, arguments: argparse.Namespace) -> int:
    stat, manifest = store.stat(), store.manifest
    facts = {
        "store": str(store.path),
        **stat._asdict(),
        "bytes_per_adapter": stat.bytes_per_adapter,
        "keep": store.keep,
        "base": manifest.config.get("base_model_name_or_path"),
        "base_fingerprint": manifest.fingerprint,
        "basis": manifest.digest.hex(),
        "modules": len(manifest.ranks),
        "ranks": {str(rank): count for rank, count in sorted(Counter(manifest.ranks.values()).items())},
        "recipe": dict(manifest.recipe),
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in facts["ranks"].items())
    print(f"{store.path}: {stat.adapters} adapters, {stat.versions} older versions, {stat.layouts} layouts")
    print(f"size     {stat.nbytes / 1e6:.1f} MB, {stat.free_bytes / 1e6:.1f} of them free; ", end="")
    print(f"{stat.bytes_per_adapter:.0f} bytes an adapter; {stat.readers} readers now")
    print(f"base     {facts['base'] or 'without a name'} (fingerprint {manifest.fingerprint or 'unknown'})")
    print(f"modules  {ranks}")
    print(f"keeps    {store.keep} version{'s' if store.keep > 1 else ''} of an adapter")
    return 0


def _check(store: AdapterStore, arguments: argparse.Namespace) -> int:
    with tqdm(total=len(store), desc="check", unit="adapter") as bar:
        problems = store.check(bar.update)
    for problem in problems:
        print(f"loraxs store: {problem}", file=sys.stderr)
    print(f"{store.path}: {len(store)} adapters, {len(problems)} problems")
    return 1 if problems else 0


def _compact(store: AdapterStore, arguments: argparse.Namespace) -> int:
    before = store.stat().nbytes
    store.compact(arguments.output)
    after = (arguments.output / "data.mdb").stat().st_size
    print(f"{arguments.output}: {after / 1e6:.1f} MB instead of {before / 1e6:.1f} MB")
    return 0


def _delete(store: AdapterStore, arguments: argparse.Namespace) -> int:
    # All of them or none, as far as one can know before.
    for name in arguments.names:
        store.version(name)
    for name in arguments.names:
        store.delete(name)
    print(f"{store.path}: {len(arguments.names)} deleted, {len(store)} left")
    return 0


def _export(store: AdapterStore, arguments: argparse.Namespace) -> int:
    names: Iterable[str] = arguments.names or store.names(arguments.prefix)
    done, refused = 0, 0
    total = len(arguments.names) or (None if arguments.prefix else len(store))
    for name in tqdm(names, total=total, desc="export", unit="adapter"):
        try:
            unpack(store, name, arguments.output / _inside(name), overwrite=arguments.overwrite)
            done += 1
        except (ValueError, FileExistsError) as reason:
            tqdm.write(f"loraxs store: {name!r} was not exported: {reason}", file=sys.stderr)
            refused += 1
    print(f"{arguments.output}: {done} exported" + (f", {refused} not" if refused else ""))
    return 1 if refused else 0


def _inside(name: str) -> PurePosixPath:
    """A name as a path below the folder of the export.

    Raises:
        ValueError: it would lead out of it, or is not the name of one file.
    """
    path = PurePosixPath(name)
    plain = path.parts and not path.is_absolute() and path.as_posix() == name and ".." not in path.parts
    if not plain or "\\" in name or ":" in name or any(len(part.encode()) > _LONGEST for part in path.parts):
        raise ValueError(f"expected a plain relative path with parts of at most {_LONGEST} bytes")
    return path


_ACTIONS: dict[str, Callable[[AdapterStore, argparse.Namespace], int]] = {
    "list": _list,
    "info": _info,
    "check": _check,
    "compact": _compact,
    "delete": _delete,
    "export": _export,
}
