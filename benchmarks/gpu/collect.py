"""Runs the worker, starts it again without a provider that broke the device, and keeps the result on disk complete."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from benchmarks._measure import ROOT, write_json
from benchmarks.gpu import dry
from benchmarks.gpu.stages import TAIL_CHARACTERS, Deadline, end
from benchmarks.gpu.targets import judge

# Longer than any kernel takes to compile; a worker that is silent for so long hangs.
SILENCE_SECONDS = 90.0
MAX_WORKERS = 8
WORKER = [sys.executable, "-m", "benchmarks.gpu.worker"]


class Collector:
    """The result as far as it is known; written after every row.

    Args:
        path: the JSON file.
        deadline: of the whole call.
        commit: stands in where there is no git folder.
        is_dry: whether this is a dry run, whose rows hold no times.
    """

    def __init__(self, path: Path, deadline: Deadline, *, commit: str | None, is_dry: bool) -> None:
        self.path, self.deadline, self.commit, self.dry = path, deadline, commit, is_dry
        self.environment: dict[str, Any] = {}
        self.ceilings: dict[str, Any] = {}
        self.stages: dict[str, Any] = {}
        self.rows: dict[int, dict[str, Any]] = {}
        self.memory: dict[str, Any] | None = None
        self.basis: list[dict[str, Any]] = []
        self.serving: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.planned: list[str] = []

    def stage(self, name: str, outcome: dict[str, Any]) -> None:
        """Note what a stage found."""
        self.stages[name] = outcome
        self.write()

    def measure(self, kinds: tuple[str, ...], cell_seconds: float, until: float) -> None:
        """Run workers until all cells of `kinds` have a row, or until the time `until`."""
        excluded: list[str] = []
        first = 0
        for _ in range(MAX_WORKERS):
            if time.time() > until:
                return
            last, fault = self._run_worker(kinds, cell_seconds, until, first, excluded)
            if fault is None:
                return
            self.failures.append({**last, "fault": fault})
            provider, first = last.get("provider"), last.get("cell", -1)
            if first < 0:
                return  # The device does not even do a copy; another process will not either.
            if provider == "timing":
                first += 1
            else:
                excluded.append(f"{last['kind']}:{provider}")

    def _run_worker(
        self, kinds: tuple[str, ...], cell_seconds: float, until: float, first: int, excluded: list[str]
    ) -> tuple[dict[str, Any], str | None]:
        """What it was doing last, and what went wrong, if anything did."""
        command = [*WORKER, "--until", str(until), "--first", str(first)]
        command += ["--seconds", str(cell_seconds), "--kinds", *kinds, "--exclude", *excluded]
        command += ["--dry-run"] if self.dry else []
        settings = os.environ | (dry.ENVIRONMENT if self.dry else {})
        doing: dict[str, Any] = {}
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            child = subprocess.Popen(
                command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
            assert child.stdout is not None
            lines = _lines(child.stdout)
            while True:
                try:
                    line = lines.get(timeout=self.deadline.left(SILENCE_SECONDS))
                except queue.Empty:
                    end(child)
                    late = time.time() > until
                    return doing, None if late else f"silent for {SILENCE_SECONDS:.0f} s"
                if line is None:
                    break
                doing = self._take(json.loads(line), doing)
            code = child.wait()
            log.seek(0)
            tail = log.read()[-TAIL_CHARACTERS:]
        return doing, None if code == 0 else f"exit code {code}: {tail}"

    def _take(self, event: dict[str, Any], doing: dict[str, Any]) -> dict[str, Any]:
        """File one event; returns what the worker is doing."""
        kind = event.pop("event")
        if kind == "begin":
            return event
        if kind == "plan":
            self.planned = event["cells"]
        elif kind == "environment":
            self.environment = event["environment"]
            if self.environment["commit"] is None:
                self.environment["commit"] = self.commit
        elif kind == "ceilings":
            self.ceilings = event
        elif kind == "memory":
            self.memory = event["row"]
        elif kind == "basis":
            self.basis = event["rows"]
        elif kind == "serving":
            # A worker that was started again begins anew.
            self.serving = [row for row in self.serving if not _same_cell(row, event["row"])] + [event["row"]]
        elif kind == "row":
            row = event["row"]
            if self.dry:
                for figure in ("times", "ratio", "share_of_limit"):
                    del row[figure]
            self.rows[event["cell"]] = row
        self.write()
        return doing

    def clean(self) -> bool:
        """Whether every stage passed, no worker broke and no provider failed."""
        outcomes = [
            part for stage in self.stages.values() for part in ([stage] if "outcome" in stage else stage.values())
        ]
        stages = all(part["outcome"] not in ("failed", "timeout") for part in outcomes)
        return stages and not self.failures and not any(row["failed"] for row in self.rows.values())

    def write(self) -> dict[str, Any]:
        """The result so far, on disk and returned."""
        rows = [self.rows[number] for number in sorted(self.rows)]
        result = {
            "environment": self.environment,
            "dry_run": self.dry,
            "ceilings": {} if self.dry else self.ceilings,
            "stages": self.stages,
            "targets": [] if self.dry else judge(rows, self.memory, self.serving),
            "memory": self.memory,
            "basis": self.basis,
            "serving": self.serving,
            "failures": self.failures,
            "missing": [cell for number, cell in enumerate(self.planned) if number not in self.rows],
            "rows": rows,
        }
        write_json(self.path, result)
        return result


def _same_cell(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return (row["what"], row.get("adapters")) == (other["what"], other.get("adapters"))


def _lines(stream: IO[str]) -> queue.Queue[str | None]:
    """The lines of a stream as they come; None after the last."""
    found: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found
