"""How every benchmark here measures: providers alternate in one run, medians with spread, device and commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

# Short calls of one provider are timed together until they fill the first, and calls that take no longer than the
# second come after one that is not timed: a model calls the same layer code over and over, so neither the clock's cost
# nor the caches that the last provider left may count.
SLICE_SECONDS, WARM_SECONDS = 1e-3, 10e-3
MIN_ROUNDS = 7


def wall_clock(call: Callable[[], Any], repeat: int) -> float:
    """Seconds that `repeat` calls take."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return time.perf_counter() - start


def turns(names: Sequence[str], shuffle: random.Random) -> Iterator[list[str]]:
    """Orders of the names without end, in blocks in which each comes right after each other one equally often.

    A call meets the clock speed and the caches that its neighbour left; with one fixed order that is a bias of several
    per cent. The blocks are Latin squares balanced for that (Williams 1949), their rows in random order.
    """
    n = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else n - i // 2 for i in range(n)]  # n, 1, n - 1, 2, …: every distance once
    while True:
        labels = shuffle.sample(list(names), n)
        block = [[labels[(z + i) % n] for z in zigzag] for i in range(n)]
        block += [order[::-1] for order in block] if n % 2 else []
        shuffle.shuffle(block)
        yield from block


def alternate(
    providers: Mapping[str, Callable[[], Any]],
    seconds: float,
    stopwatch: Callable[[Callable[[], Any], int], float] = wall_clock,
) -> dict[str, list[float]]:
    """Seconds per call of every provider, one sample a round, all providers in each round.

    Machines drift and share cores: a ratio is taken within a round, where both sides met the same conditions.

    Args:
        providers: what to time, by name.
        seconds: time to spend on all of them together; `MIN_ROUNDS` rounds run in any case.
        stopwatch: (call, repeat) -> seconds for `repeat` calls; for devices that work asynchronously.
    """
    once = {}
    for name, call in providers.items():
        call()
        once[name] = max(stopwatch(call, 1), 1e-7)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    end = time.perf_counter() + seconds
    for done, order in enumerate(turns(list(providers), random.Random(0))):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name in order:
            call, repeat = providers[name], max(1, min(100, int(SLICE_SECONDS / once[name])))
            if once[name] < WARM_SECONDS:
                call()
            samples[name].append(stopwatch(call, repeat) / repeat)
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
    import loraxs_ext
    import loraxs_ext.ops  # noqa: F401  (loads the compiled ops that _C reports on)
    from loraxs_ext.cli import cpu_name

    # Results that are being written are no changes of what is measured.
    changes = _git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        **_compiled(),
        "torch": torch.__version__,
        "peft": _installed("peft"),
        "loraxs_ext": loraxs_ext.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def gpu_environment() -> dict[str, Any]:
    """The same for figures of a CUDA device: what `environment` says of the processor moves to `host`."""
    import loraxs_ext.ops
    from loraxs_ext.cli import cpu_name

    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    found = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    return {
        "device": device.name,
        "host": cpu_name(),
        "driver": found.stdout.strip() if found is not None and found.returncode == 0 else None,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "l2_bytes": device.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": _installed("triton"),
        "backend": loraxs_ext.ops.backends.BACKEND,
        "owners": {op: by_device["cuda"] for op, by_device in loraxs_ext.ops.backends.owners().items()},
    }


def _git(*arguments: str) -> str | None:
    """What git says of this tree; None where there is no git, or the tree came without its history."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def _compiled() -> dict[str, str | None]:
    """Instruction set and compiler of the compiled ops; None where they are not built."""
    try:
        from loraxs_ext import _C
    except ImportError:
        return {"isa": None, "compiler": None}
    return {"isa": _C.cpu_isa(), "compiler": _C.build_info()["compiler"]}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_results(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """benchmarks/results/<name>.json with the environment and one entry per measured cell."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": environment(), **more, "rows": rows})
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write to a temporary name, sync and rename: `path` is complete whenever it exists."""
    partial = path.with_suffix(".json.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
