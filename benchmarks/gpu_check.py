"""Everything that only a GPU can tell, in one call of under ten minutes.

    python benchmarks/gpu_check.py                     builds, tests, measures; writes results/gpu-<device>.json
    python benchmarks/gpu_check.py --only decode       one kind of cell, without build and tests
    python benchmarks/gpu_check.py --dry-run           walks the same code on a CPU with tiny shapes; no figures

The order is that of value: correctness, then the cells that targets name, then the rest. What the deadline cuts is
listed in the result under `missing`. Exit status: 0, 1 when something failed, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks._measure import RESULTS  # noqa: E402
from benchmarks.gpu.cells import BASIS, KINDS, SERVING  # noqa: E402
from benchmarks.gpu.collect import Collector  # noqa: E402
from benchmarks.gpu.stages import Deadline, build, sanitize, test  # noqa: E402

STAGES = ("build", "tests", "sanitizer")
MEASURED = (*KINDS, BASIS, SERVING)
TOTAL_SECONDS = 560.0
# Kept back for writing the result and for the end of the cell that is under way.
RESERVE_SECONDS = 12.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--only", nargs="+", choices=STAGES + MEASURED, help="these stages and kinds of cells alone")
    parser.add_argument("--skip-build", action="store_true", help="use what is built")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of the whole call")
    parser.add_argument("--cell-seconds", type=float, default=0.4, help="of timing per cell")
    parser.add_argument("--commit", help="commit of this tree, where it came without its git folder")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, no figures")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device here; --dry-run walks the code without one.", file=sys.stderr)
        return 2
    deadline = Deadline(arguments.seconds)
    wanted = set(arguments.only or STAGES + MEASURED) - ({"build"} if arguments.skip_build else set())
    kinds = tuple(kind for kind in MEASURED if kind in wanted)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "dry-run" if arguments.dry_run else re.sub(r"\W+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    path = arguments.output / f"gpu-{name}.json"
    collector = Collector(path, deadline, commit=arguments.commit, is_dry=arguments.dry_run)
    if "build" in wanted:
        collector.stage("build", build(deadline, arguments.dry_run))
    # Neither of these is timed, so they may share the device.
    with ThreadPoolExecutor() as pool:
        checks = {"tests": test, "sanitizer": sanitize}
        running = {
            name: pool.submit(check, deadline, arguments.dry_run) for name, check in checks.items() if name in wanted
        }
        for name, future in running.items():
            collector.stage(name, future.result())
    if kinds:
        collector.measure(kinds, arguments.cell_seconds, deadline.at - RESERVE_SECONDS)
    result = collector.write()
    show(result)
    print(f"\nwritten to {path} after {arguments.seconds - deadline.at + time.time():.0f} s")
    return 0 if collector.clean() else 1


def show(result: dict[str, Any]) -> None:
    """The stages, one line per row, the targets."""
    for stage, outcome in result["stages"].items():
        parts = {stage: outcome} if "outcome" in outcome else outcome
        for part, found in parts.items():
            print(f"{stage:10} {part:24} {found['outcome']:8} {found.get('counts', '')}")
            for name, message in found.get("failures", {}).items():
                print(f"    {name}: {message.splitlines()[0] if message else ''}")
    for row in result["rows"]:
        ratios = ", ".join(f"{name} {value:.3f}" for name, value in row.get("ratio", {}).items())
        print(f"{row['kind']:9} M{row['M']:<6} {row['K']}->{row['N']} r{row['r']:<3} {ratios}")
        for name, reason in (row["refused"] | row["failed"]).items():
            print(f"    no figure for {name}: {reason}")
    for row in result["basis"]:
        print(f"basis     {row}")
    for row in result["serving"]:
        print(f"serving   {row}")
    for failure in result["failures"]:
        print(f"FAILED {failure}")
    for verdict in result["targets"]:
        met = {True: "met", False: "NOT MET", None: "not measured"}[verdict["met"]]
        print(f"{met:12} {verdict['target']}: {verdict['worst']} (limit {verdict['limit']})")
        for owner, found in verdict.get("by_owner", {}).items():
            print(f"{'':12}   {owner}: {found['worst']:.3f} at {found['worst_cell']}, {found['cells']} cells")
    if result["missing"]:
        print(f"{len(result['missing'])} planned cells were not measured")


if __name__ == "__main__":
    sys.exit(main())
