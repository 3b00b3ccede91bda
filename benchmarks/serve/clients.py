"""`loraxs serve` as a process, clients that ask it, and an administrator who changes its adapters meanwhile."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

API_KEY, ADMIN_KEY = "benchmark-client-key", "benchmark-admin-key"
NAME = "served"
# What a connection may fail with.
BROKEN = (OSError, http.client.HTTPException)


class Site(NamedTuple):
    """What is served.

    Attributes:
        model, store: folders.
        arguments: more of `loraxs serve`.
        log: file for its log.
    """

    model: Path
    store: Path
    arguments: Sequence[str]
    log: Path


@contextmanager
def served(site: Site) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A running server: its port and its process, which is ended in order if it still runs."""
    keys = {"LORAXS_API_KEY": API_KEY, "LORAXS_ADMIN_KEY": ADMIN_KEY}
    command = [sys.executable, "-m", "loraxs_ext.cli", "serve", str(site.model), "--store", str(site.store)]
    command += ["--name", NAME, "--port", "0", *site.arguments]
    from os import environ

    with site.log.open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env={**environ, **keys})
    try:
        yield _port(site.log, process), process
    finally:
        process.terminate()
        try:
            process.wait(120)
        finally:
            process.kill()
            process.wait()


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    while process.poll() is None:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("{") and (event := json.loads(line))["event"] == "listening":
                return int(event["port"])
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


class Connection:
    """Keeps a connection open from one request to the next."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self._headers = {"Authorization": f"Bearer {key}"}

    def send(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, Any]:
        """Status and JSON. Raises one of `BROKEN`."""
        try:
            self._connection.request(method, path, body, {**self._headers, "Content-Type": kind})
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())
        except BROKEN:
            self._connection.close()
            raise

    def complete(self, adapter: str | None, prompt: Sequence[int], new: int) -> tuple[int, Any]:
        """Ask for a greedy answer."""
        model = NAME if adapter is None else f"{NAME}:{adapter}"
        body = {"model": model, "prompt": list(prompt), "max_tokens": new, "temperature": 0}
        return self.send("POST", "/v1/completions", json.dumps(body).encode())

    def put(self, adapter: str, files: Mapping[str, bytes]) -> int:
        """Add or replace an adapter; the status."""
        mark = "----no-such-line-in-any-file"
        parts = [
            f'--{mark}\r\nContent-Disposition: form-data; name="{field}"; filename="{field}"\r\n\r\n'.encode() + content
            for field, content in files.items()
        ]
        body = b"\r\n".join([*parts, f"--{mark}--\r\n".encode()])
        path = f"/admin/adapters/{quote(adapter, safe='')}"
        return self.send("PUT", path, body, f"multipart/form-data; boundary={mark}")[0]

    def delete(self, adapter: str) -> int:
        """Delete an adapter; the status."""
        return self.send("DELETE", f"/admin/adapters/{quote(adapter, safe='')}")[0]


class Asked(NamedTuple):
    """One request.

    Attributes:
        adapter: None for the base model.
        prompt: its number.
        start, end: seconds.
        status: of HTTP; 0 if there was no answer.
        text, tokens: of the answer.
    """

    adapter: str | None
    prompt: int
    start: float
    end: float
    status: int
    text: str
    tokens: int


class Period(NamedTuple):
    """What an adapter was, from the beginning of the request that made it so to the end of the one that changed it.

    Attributes:
        content: number of what was put; None while there is no such adapter.
        start, end: seconds.
    """

    content: int | None
    start: float
    end: float


class Administrator(threading.Thread):
    """Adds, replaces and deletes adapters until it is stopped.

    Args:
        port: of the server.
        contents: files of each content.
        begin: what adapters are at the beginning; others of `names` are not there.
        names: adapters to change.
        pause: seconds between two changes.
    """

    def __init__(
        self,
        port: int,
        contents: Sequence[Mapping[str, bytes]],
        begin: Mapping[str, int],
        names: Sequence[str],
        pause: float,
    ) -> None:
        super().__init__()
        self._connection, self._contents, self._names, self._pause = Connection(port, ADMIN_KEY), contents, names, pause
        self._ending = threading.Event()
        self.history: dict[str, list[Period]] = {
            name: [Period(begin.get(name), -1.0, float("inf"))] for name in {*begin, *names}
        }
        self.counts = {"added": 0, "replaced": 0, "deleted": 0}
        self.error: BaseException | None = None

    def stop(self) -> None:
        """End after the change that is being made. Raises what went wrong."""
        self._ending.set()
        self.join()
        if self.error is not None:
            raise self.error

    def allowed(self, name: str, start: float, end: float) -> set[int | None]:
        """Everything that an adapter was at some time in between."""
        return {one.content for one in self.history[name] if one.start <= end and one.end >= start}

    def run(self) -> None:
        turn = 0
        try:
            while not self._ending.wait(self._pause):
                self._change(self._names[turn % len(self._names)], turn)
                turn += 1
        except BaseException as error:
            self.error = error

    def _change(self, name: str, turn: int) -> None:
        periods = self.history[name]
        content = periods[-1].content
        # Every third change of an adapter is that it goes; it comes back with the next.
        deletes = content is not None and (turn // len(self._names)) % 3 == 2
        new = None if deletes else ((-1 if content is None else content) + 1 + turn) % len(self._contents)
        start = time.monotonic()
        periods.append(Period(new, start, float("inf")))
        status = self._connection.delete(name) if new is None else self._connection.put(name, self._contents[new])
        if status not in (200, 201):
            raise RuntimeError(f"a change of {name} was answered with {status}")
        periods[-2] = periods[-2]._replace(end=time.monotonic())
        self.counts["deleted" if new is None else "added" if content is None else "replaced"] += 1


def ask_for(
    seconds: float,
    port: int,
    clients: int,
    choose: Callable[[int, int], tuple[str | None, int]],
    prompts: Sequence[Sequence[int]],
    new: int,
) -> list[Asked]:
    """Let clients ask, each one request after the other, and wait for what was asked in this time.

    Args:
        choose: (client, turn) -> adapter and number of the prompt.
        prompts: as tokens.
        new: most tokens of an answer.
    """
    found: list[list[Asked]] = [[] for _ in range(clients)]
    deadline = time.monotonic() + seconds

    def work(client: int) -> None:
        connection, turn = Connection(port, API_KEY), 0
        while time.monotonic() < deadline:
            adapter, prompt = choose(client, turn)
            start = time.monotonic()
            status, text, tokens = 0, "", 0
            try:
                status, body = connection.complete(adapter, prompts[prompt], new)
                if status == 200:
                    text, tokens = body["choices"][0]["text"], body["usage"]["completion_tokens"]
            except BROKEN:
                pass
            found[client].append(Asked(adapter, prompt, start, time.monotonic(), status, text, tokens))
            if not status:
                return
            turn += 1

    threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for some in found for one in some]
