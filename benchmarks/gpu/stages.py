"""What runs before anything is timed: the build, the tests that need a GPU, the memory checker. Each in processes of
its own, each with its outcome on record."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._measure import ROOT
from benchmarks.gpu.dry import ENVIRONMENT

# Together they leave a third of the call to the measurements, should all of them run to their ends.
BUILD_SECONDS = 180.0
TEST_SECONDS = 170.0
SANITIZER_SECONDS = 170.0
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
TAIL_CHARACTERS = 3000
GPU_TESTS = "python_tests/gpu"


class Deadline:
    """The moment at which everything must be written, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.at = time.time() + seconds

    def left(self, at_most: float = float("inf")) -> float:
        """Seconds left, at least a moment, so that a child fails by its own timeout."""
        return max(0.1, min(at_most, self.at - time.time()))


def run(command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run to the end or to the timeout.

    Returns:
        outcome "passed", "failed" or "timeout", `seconds`, and the end of the output unless it passed.
    """
    start = time.monotonic()
    settings = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A session of its own, so that a timeout also ends what the child started.
        child = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = child.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
            end(child)
        log.seek(0)
        output = log.read()
    outcome = "timeout" if code is None else "failed" if code else "passed"
    result: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    if outcome != "passed":
        result |= {"exit_code": code, "output_tail": output[-TAIL_CHARACTERS:]}
    return result


def end(child: subprocess.Popen[Any]) -> None:
    """Kill a child that leads a process group, with its children."""
    try:
        os.killpg(child.pid, 9)
    except ProcessLookupError:
        pass
    child.wait()


def build(deadline: Deadline, dry: bool) -> dict[str, Any]:
    """setup.py build_ext --inplace, for this device alone."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if dry:
        return run([*command, "--help"], deadline.left(BUILD_SECONDS))
    major, minor = torch.cuda.get_device_capability(0)
    arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    return run(command, deadline.left(BUILD_SECONDS), {"LORAXS_CUDA": "auto", "LORAXS_CUDA_ARCHS": arch})


class Part(NamedTuple):
    """One process of tests: arguments for pytest, and the LORAXS_BACKEND it runs under, if not the caller's."""

    arguments: Sequence[str]
    backend: str | None = None


def test(deadline: Deadline, dry: bool) -> dict[str, Any]:
    """The tests marked `gpu`, several processes at a time: one that loses the device takes no others with it."""
    parts = {"graphs": Part([f"{GPU_TESTS}/test_graphs.py"])} if dry else _parts()
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) * 5 // 8)) as pool:
        running = {name: pool.submit(pytest_part, part, deadline, dry) for name, part in parts.items()}
        return {name: future.result() for name, future in running.items()}


def _parts() -> dict[str, Part]:
    # Most of the time goes into compiling kernels, so what compiles different ones runs side by side.
    rule = f"{GPU_TESTS}/test_error_rule.py"
    ops = {"linear": "not linear_backward and not add_delta", "backward": "linear_backward", "add_delta": "add_delta"}
    parts = {
        f"{op}, {size}": Part([rule, "-k", f"({selected}) and {'' if size == 'large' else 'not '}large"])
        for op, selected in ops.items()
        for size in ("large", "small")
    }
    parts |= {name: Part([f"{GPU_TESTS}/test_{name}.py"]) for name in ("hazards", "graphs", "layers", "distributed")}
    parts["elsewhere"] = Part(["python_tests", f"--ignore={GPU_TESTS}"])
    # The C++ kernels own what they compute only where they are asked for.
    parts["C++ kernels"] = Part([GPU_TESTS, "-k", "loraxs-cuda or CUDA-cuda"], backend="cuda")
    return parts


def pytest_part(part: Part, deadline: Deadline, dry: bool) -> dict[str, Any]:
    """One pytest process over tests marked `gpu`, with what failed by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [*part.arguments, *(["--collect-only"] if dry else [])]
        settings = {"LORAXS_BACKEND": part.backend} if part.backend else None
        result = run(command, deadline.left(TEST_SECONDS), settings)
        # 5: nothing there is marked gpu.
        if result.get("exit_code") == 5:
            return {"outcome": "nothing to run", "seconds": result["seconds"]}
        return result | (_counts(report) if report.exists() else {})


def _counts(report: Path) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: dict[str, str] = {}
    reasons: dict[str, int] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        fault = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if fault is not None:
            counts["failed"] += 1
            failures[str(case.get("name"))] = (fault.get("message") or "")[:300]
        elif skip is not None:
            counts["skipped"] += 1
            reason = skip.get("message") or ""
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    return {"counts": counts, "failures": failures, "skip_reasons": reasons}


def sanitize(deadline: Deadline, dry: bool) -> dict[str, Any]:
    """Every owner on small shapes under compute-sanitizer; only walked once without it in a dry run."""
    small = [sys.executable, "-m", "benchmarks.gpu.small"]
    if dry:
        command = [*small, "--device", "cpu", "--quick"]
        return {"walked": run(command, deadline.left(SANITIZER_SECONDS), ENVIRONMENT)}
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        return {"outcome": "compute-sanitizer is not installed"}
    # Without the caching allocator every tensor is an allocation of its own, with its own ends to run over.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checks = {tool: [found, "--tool", tool, "--error-exitcode", "9", *small] for tool in SANITIZER_TOOLS}
    with ThreadPoolExecutor(max_workers=len(checks)) as pool:
        running = {
            tool: pool.submit(run, command, deadline.left(SANITIZER_SECONDS), settings)
            for tool, command in checks.items()
        }
        return {tool: future.result() for tool, future in running.items()}
