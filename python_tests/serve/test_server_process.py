"""`loraxs serve` as a process: it is killed, it is asked to end, and what it refuses to start with."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraxs_ext.store import AdapterStore

from .server_scenes import ADMIN_KEY, API_KEY, Running, Site, files_of, make_site, put, running, send

ROOT = Path(__file__).parents[2]
SECRET = "word5 word6 word7"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


def command(site: Site, *arguments: str) -> list[str]:
    given = ("--store", str(site.store), "--name", "tiny", "--port", "0", *arguments)
    return [sys.executable, "-m", "loraxs_ext.cli", "serve", str(site.model), *given]


@contextmanager
def process(site: Site, keys: Path) -> Iterator[tuple[Running, subprocess.Popen, list[dict]]]:
    """A running server, and the lines of its log so far."""
    arguments = ["--api-key-file", str(keys / "api"), "--slots", "2", "--cache-tokens", "1024"]
    environment = {**os.environ, "LORAXS_ADMIN_KEY": ADMIN_KEY, "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(
        command(site, *arguments), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    lines: list[dict] = []
    listening = threading.Event()

    def read() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("{"):
                lines.append(json.loads(line))
                if lines[-1]["event"] == "listening":
                    listening.set()
        listening.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert listening.wait(120) and lines and child.poll() is None
        yield Running(None, f"http://127.0.0.1:{lines[-1]['port']}"), child, lines
    finally:
        child.kill()
        child.wait()
        reader.join()


@pytest.fixture
def keys(tmp_path) -> Path:
    (tmp_path / "api").write_text(f"another-key-0123456789\n\n{API_KEY}\n")
    return tmp_path


def test_killed_under_load_and_asked_to_end(site: Site, keys):
    """What was committed is there after kill -9; SIGTERM finishes what runs and takes nothing new."""
    committed: list[str] = []
    some = files_of(site.folders["spare"])
    with process(site, keys) as (server, child, _), ThreadPoolExecutor(6) as threads:

        def write(worker: int) -> None:
            for number in range(10_000):
                name = f"{worker}/{number}"
                try:
                    if put(server, name.replace("/", "%2F"), some)[0] == 201:
                        committed.append(name)
                except (OSError, http.client.HTTPException):
                    return

        def ask() -> None:
            body = json.dumps({"model": "tiny:alice", "prompt": SECRET, "max_tokens": 50})
            try:
                while send(server, "POST", "/v1/completions", body)[0] == 200:
                    pass
            except (OSError, http.client.HTTPException):
                return

        for worker in range(2):
            threads.submit(write, worker)
        for _ in range(3):
            threads.submit(ask)
        while len(committed) < 5:
            time.sleep(0.01)
        child.kill()
    with AdapterStore(site.store, readonly=True) as store:
        assert store.check() == [] and set(committed) <= set(store) and len(committed) >= 5

    with process(site, keys) as (server, child, lines):
        for name in ("alice", committed[-1]):
            answer = server.client().completions.create(
                model=f"tiny:{name}", prompt=SECRET, max_tokens=5, temperature=0
            )
            assert answer.choices[0].text == site.text("alice" if name == "alice" else "spare", SECRET, 5)
        options = {"model": "tiny:alice", "prompt": SECRET, "max_tokens": 400, "temperature": 0, "stream": True}
        stream = iter(server.client().completions.create(**options))
        texts = [next(stream).choices[0].text]
        child.send_signal(signal.SIGTERM)
        while not any(line["event"].startswith("Shutting down") for line in lines):
            time.sleep(0.01)
        with pytest.raises(OSError):
            send(server, "GET", "/health")
        texts += [chunk.choices[0].text for chunk in stream]
        assert "".join(texts) == site.text("alice", SECRET, 400)
        assert child.wait(30) == 0
    check_log(lines)


def check_log(lines: list[dict]) -> None:
    requests = [line for line in lines if line["event"] == "request"]
    assert {line["status"] for line in requests} == {200} and lines[-1]["event"] == "ended"
    last = requests[-1]
    assert (last["route"], last["adapter"], last["prompt_tokens"], last["tokens"]) == ("completions", "alice", 3, 400)
    text = json.dumps(lines)
    assert "word" not in text and API_KEY not in text and ADMIN_KEY not in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host: expected a loopback address"),
        (["--api-key-file", "short"], "short, key 1: expected at least 16"),
        (["--api-key-file", "empty"], "expected at least one key"),
        (["--api-key-file", "missing"], "missing"),
        (["--max-queue", "-1"], "queue: expected a positive number"),
        (["--store", "nowhere"], "expected an adapter store"),
        (["--slots", "0"], "slots"),
    ],
    ids=str,
)
def test_it_does_not_start(site: Site, tmp_path, monkeypatch, capsys, arguments, sentence):
    """All but the last are said before the model is read."""
    from loraxs_ext import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("secret-key")
    (tmp_path / "empty").write_text("\n")
    assert cli.main(command(site)[3:] + arguments) == 1
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("loraxs serve: ") and sentence in message and "secret-key" not in message


def test_the_end_comes_even_if_an_answer_does_not(site: Site):
    """Requests that run longer than the server waits for are ended with an error, and their slots are free."""
    with running(site, grace=1) as server:
        body = json.dumps({"model": "tiny:alice", "prompt": SECRET, "max_tokens": 1900, "stream": True})
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(send, server, "POST", "/v1/completions", body)
            while not server.service.engine.running:
                time.sleep(0.005)
            server.stop()
            start = time.monotonic()
            # The connection is cut, or its stream ends without the mark of a whole answer.
            failed = answer.exception()
            assert isinstance(failed, (OSError, http.client.HTTPException)) or "[DONE]" not in answer.result()[2]
        assert time.monotonic() - start < 30
    assert server.service.engine.running == 0
