"""The file of results: one row per finished run, added under a lock and in one piece, so that work can be resumed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._measure import environment, write_json

from .methods import ANCHOR
from .summary import differences
from .training import Protocol

Content = dict[str, Any]
KEY = ("task", "method", "rate", "seed")


class Results:
    """A results file that several processes may add to.

    path: of the JSON file; made at the first row.
    protocol: what its runs share.

    Raises:
        ValueError: the file is of another protocol.
    """

    def __init__(self, path: Path, protocol: Protocol) -> None:
        self.path, self.protocol = path, asdict(protocol)
        self._environment: Content | None = None
        self.read()

    def read(self) -> Content:
        """All that is known so far."""
        if not self.path.is_file():
            return {"kind": "comparison", "protocol": self.protocol, "methods": {}, "tasks": {}, "rows": []}
        content: Content = json.loads(self.path.read_text(encoding="utf-8"))
        if content.get("protocol") != self.protocol:
            raise ValueError(
                f"{self.path}: protocol: expected {self.protocol}, got {content.get('protocol')}; "
                "name another file for another protocol"
            )
        return content

    def rows(self, **where: Any) -> list[Content]:
        """The runs whose fields are as given."""
        return [row for row in self.read()["rows"] if all(row[name] == value for name, value in where.items())]

    def put(self, row: Mapping[str, Any]) -> None:
        """Add a run, in place of one with the same task, method, rate and seed."""
        self._environment = self._environment or environment()
        stamped = {**row, "commit": self._environment["commit"]}

        def change(content: Content) -> None:
            kept = [old for old in content["rows"] if any(old[name] != row[name] for name in KEY)]
            content["rows"] = [*kept, stamped]
            content["environment"] = self._environment
            content["against_loraxs"] = differences(content, ANCHOR)

        self.change(change)

    def note(self, section: str, name: str, facts: Mapping[str, Any]) -> None:
        """Put what is known of a task or a method into its section."""
        self.change(lambda content: content[section].update({name: dict(facts)}))

    def change(self, change: Callable[[Content], None]) -> None:
        """Read, change and write the file while nobody else does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            content = self.read()
            change(content)
            write_json(self.path, content)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which ends with the process however that ends."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
