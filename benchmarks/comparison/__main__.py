"""Our adapters against PEFT's on three text tasks: accuracy over seeds, size, seconds per step and peak memory.

    python -m benchmarks.comparison            tune, train and score what is missing in results/comparison.json: hours
    python -m benchmarks.comparison --speed    seconds per step and peak memory, on an otherwise idle machine: minutes
    python -m benchmarks.comparison --report   the table of what is there, and its figure in build/comparison.png

Every method is tuned alike: three learning rates, a factor of three apart, centred on its usual one, tried with the
first seed on dev rows; the best one is trained with the other seeds too, and only it is scored on the test rows. A
method runs only after its checks: it starts as the frozen model, trains its own parameters and no others, and gives
the same logits when reloaded. What is finished is kept: stop whenever you like, and call again to go on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks._measure import RESULTS, ROOT

from .checks import CheckFailed, check
from .methods import METHODS, Method
from .report import draw, markdown
from .results import Results
from .runs import load_data, orient, quieten, run_named
from .training import Protocol, batches

TASKS = ("movie", "product", "source")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 1 when a method failed its checks."""
    arguments = _parser().parse_args(argv)
    quieten()
    protocol = Protocol(train=arguments.rows)
    results = Results(arguments.results, protocol)
    if arguments.report:
        print(markdown(results.read()))
        draw(results.read(), arguments.plot)
        return 0
    methods = [METHODS[name] for name in arguments.methods]
    passed = [method for method in methods if _passes(method, protocol, results)]
    if arguments.speed:
        from .speed import measure

        measure(passed, load_data(protocol)["movie"], protocol, results)
    else:
        _train(passed, arguments, protocol, results)
    return int(len(passed) < len(methods))


def _passes(method: Method, protocol: Protocol, results: Results) -> bool:
    """Check a method, and note its sizes; a method that fails is left out."""
    data = load_data(protocol)[TASKS[0]]
    try:
        facts = check(method, data.base, next(batches(data.parts["train"], protocol, seed=0)))
    except CheckFailed as error:
        print(f"comparison: left out: {error}", file=sys.stderr, flush=True)
        return False
    usual = {"rates": method.rates, "usual_rate_from": method.why}
    results.note("methods", method.name, {**facts, **usual})
    return True


def _train(methods: Sequence[Method], arguments: argparse.Namespace, protocol: Protocol, results: Results) -> None:
    """Every cell of the table, `--jobs` at a time, in processes of their own."""
    for task in arguments.tasks:
        orient(load_data(protocol)[task], results)
    cells = [(task, method.name) for method in methods for task in arguments.tasks]
    common = (arguments.seeds, protocol, arguments.results, arguments.work)
    if arguments.jobs == 1:
        for cell in cells:
            run_named(*cell, *common)
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // arguments.jobs))
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        pending = [pool.submit(run_named, *cell, *common) for cell in cells]
        try:
            for done in as_completed(pending):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first one tunes; default 0 1 2")
    parser.add_argument("--rows", type=int, default=Protocol.train, help="training rows of a task; default %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="cells trained at the same time; default 1")
    parser.add_argument("--results", type=Path, default=RESULTS / "comparison.json", help="default %(default)s")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "comparison", help="trained adapters")
    parser.add_argument("--speed", action="store_true", help="measure seconds per step and peak memory instead")
    parser.add_argument("--report", action="store_true", help="print the table of the results instead")
    plot = ROOT / "build" / "comparison.png"
    parser.add_argument("--plot", type=Path, default=plot, help="figure of --report, PNG or SVG; default %(default)s")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("comparison: stopped; what is finished is kept, the same call goes on")
