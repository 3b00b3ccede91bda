"""How every benchmark here measures: providers alternate in one run, medians with spread, device and commit."""

from __future__ import annotations

import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

# Short calls of one provider are timed together until they fill this, after one that is not timed: a model calls the
# same layer code over and over, so neither the clock's cost nor the caches that the last provider left may count.
SLICE_SECONDS = 1e-3
MIN_ROUNDS = 7


def alternate(providers: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every provider, one sample a round, all providers in each round.

    Machines drift and share cores: a ratio is taken within a round, where both sides met the same conditions. The order
    is shuffled, so that nobody always runs in the caches that the same neighbour left, and then rotated once around, so
    that everybody is first, and meets cold caches, equally often.

    Args:
        providers: what to time, by name.
        seconds: time to spend on all of them together; `MIN_ROUNDS` rounds run in any case.
    """
    names = list(providers)
    inner = {}
    for name in names:
        providers[name]()
        start = time.perf_counter()
        providers[name]()
        inner[name] = max(1, min(100, int(SLICE_SECONDS / max(time.perf_counter() - start, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    shuffle = random.Random(0)
    while len(samples[names[0]]) < MIN_ROUNDS or time.perf_counter() < end:
        shuffle.shuffle(names)
        for first in range(len(names)):
            for name in names[first:] + names[:first]:
                call, repeat = providers[name], inner[name]
                if repeat > 1:
                    call()
                start = time.perf_counter()
                for _ in range(repeat):
                    call()
                samples[name].append((time.perf_counter() - start) / repeat)
    return samples


def ratio(samples: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the time of `name` over that of `base`."""
    return statistics.median(t / b for t, b in zip(samples[name], samples[base], strict=True))


def summary(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in microseconds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median_us": statistics.median(ordered) * 1e6,
        "p10_us": ordered[round(0.1 * last)] * 1e6,
        "p90_us": ordered[round(0.9 * last)] * 1e6,
        "samples": len(ordered),
    }


def environment() -> dict[str, Any]:
    """What a reader needs to place a figure: device, threads, versions, instruction set, commit."""
    import peft

    import loraxs_ext
    import loraxs_ext.ops  # noqa: F401  (loads the compiled ops that _C reports on)
    from loraxs_ext import _C
    from loraxs_ext.cli import cpu_name

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "loraxs_ext": loraxs_ext.__version__,
        "compiler": _C.build_info()["compiler"],
        "python": platform.python_version(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "uncommitted_changes": bool(dirty.stdout.strip()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_results(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """benchmarks/results/<name>.json with the environment and one entry per measured cell."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps({"environment": environment(), **more, "rows": rows}, indent=1) + "\n")
    partial.replace(path)
    return path
