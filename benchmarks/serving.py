"""Serving many adapters on one decoder, on the CPU: generation, the store, and the way between them.

    python -m benchmarks.serving                      every section, about ten minutes on two cores, 9 GB of disk
    python -m benchmarks.serving --only generation    one of them; the others stay in the result as they are
    python -m benchmarks.serving --store DIR          fills the store there, or uses what is there, and keeps it
    python -m benchmarks.serving --smoke              walks through everything with a tiny model; no figures

Sections: `generation`, tokens/s with 1, 8, 64 and 1,000 distinct adapters in a batch, over the base model alone in the
same generate(), and PEFT's LoRA with `adapter_names`; `pack`, a million adapters into a store; `attach`, the time until
one of them is in a slot; `zipf`, a trace over 100,000 of them with 256 slots, over a slot for each.
Every section checks what it measures. What is wrong gets no figure: the section ends there, the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks._measure import RESULTS
from benchmarks.serve import catalogue, generation, zipf
from benchmarks.serve.loop import WrongTokens
from benchmarks.serve.results import merge
from benchmarks.serve.workload import RandomAdapters, Workload, manifest_of, real_workload, targets, tiny_workload
from loraxs_ext.store import AdapterStore

SECTIONS = ("generation", "pack", "attach", "zipf")
NAME = "serving-cpu.json"
ADAPTERS, ATTACHES = 1_000_000, 5_000
TINY_ADAPTERS, TINY_ATTACHES = 2_500, 300


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections alone")
    parser.add_argument("--store", type=Path, help="folder of the store, kept afterwards; default: a temporary one")
    parser.add_argument("--adapters", type=int, help=f"in the store; default {ADAPTERS:,}")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, small numbers; no figures")
    parser.add_argument("--output", type=Path, help=f"file of the result; default benchmarks/results/{NAME}")
    arguments = parser.parse_args(argv)
    smoke = arguments.smoke
    path = arguments.output or (None if smoke else RESULTS / NAME)
    workload = tiny_workload() if smoke else real_workload()
    start = time.perf_counter()

    failed = []

    def keep(section: str, measure: Callable[[], Iterable[dict[str, Any]]]) -> None:
        found = []
        try:
            for row in measure():
                found.append(row)
                print(
                    f"[{time.perf_counter() - start:4.0f} s] {section}: {'checked' if smoke else shown(row)}",
                    flush=True,
                )
                # What was measured stays, whatever the next cell brings.
                if path is not None:
                    merge(path, section, found, smoke=smoke)
        except (WrongTokens, catalogue.WrongRow) as error:
            failed.append(section)
            print(f"FAILED {section}: {error}", file=sys.stderr)

    if "generation" in arguments.only:
        cells = generation.TINY if smoke else generation.FULL
        keep("generation", lambda: generation.measure(workload, cells))
    if set(arguments.only) & {"pack", "attach", "zipf"}:
        count = arguments.adapters or (TINY_ADAPTERS if smoke else ADAPTERS)
        with ExitStack() as stack:
            folder = arguments.store or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "store"
            measure_store(folder, count, workload, arguments.only, keep, smoke)
    if path is not None:
        print(f"written to {path}")
    return 1 if failed else 0


def measure_store(
    folder: Path,
    count: int,
    workload: Workload,
    sections: Sequence[str],
    keep: Callable[[str, Callable[[], Iterable[dict[str, Any]]]], None],
    smoke: bool,
) -> None:
    """The sections that need a store, of `count` adapters, or of as many as the one at `folder` has."""
    trace = zipf.TINY if smoke else zipf.FULL
    model = workload.load(trace.dtype)
    keys, manifest, seconds = list(targets(model)), manifest_of(model), None
    del model
    if folder.exists():
        store = AdapterStore(folder, readonly=True)
        adapters = RandomAdapters(keys, len(store))
    else:
        adapters = RandomAdapters(keys, count)
        store, seconds = catalogue.make_store(folder, manifest, adapters)
    with store:
        if "pack" in sections:
            keep("pack", lambda: [catalogue.measure_pack(store, adapters, seconds)])
        if "attach" in sections:
            attaches = TINY_ATTACHES if smoke else ATTACHES
            keep("attach", lambda: [catalogue.measure_attach(store, adapters, attaches)])
        if "zipf" in sections:
            keep("zipf", lambda: [zipf.measure(workload, trace, store, adapters)])


def shown(row: dict[str, Any]) -> str:
    """The figures of a row in one line."""
    figures = {name: value for name, value in row.items() if name not in ("section", "checked")}
    return ", ".join(f"{name} {_plain(value)}" for name, value in figures.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "–".join(_plain(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
