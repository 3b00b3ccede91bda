"""A server whose cache is too small, one whose engine breaks, one that is ended early, and clients that leave early."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import pytest

from loraxs_ext.serve.server.api import create_app
from loraxs_ext.serve.server.batching import SlotBatching
from loraxs_ext.serve.server.limits import Limits
from loraxs_ext.serve.server.listening import Server, serve

from .server_scenes import (
    ADAPTERS,
    API_KEY,
    APIError,
    InternalServerError,
    Site,
    built,
    make_site,
    model_of,
    running,
    send,
)

PROMPT = "word5 word6 word7"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


def test_a_cache_that_is_too_small_for_all(site: Site):
    """Requests that lose their keys and values to others begin again, with the adapter and the numbers they had."""
    jobs = [(adapter, PROMPT, 150) for adapter in [None, *ADAPTERS]] * 2
    expected = [site.text(*job) for job in jobs[:4]] * 2
    with running(site, cache_tokens=448) as server:
        assert server.service.engine.context == 384
        client = server.client()

        def ask(job) -> str:
            stream = client.completions.create(
                model=model_of(job[0]), prompt=job[1], max_tokens=job[2], temperature=0, stream=True
            )
            return "".join(chunk.choices[0].text for chunk in stream)

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, jobs)) == expected
        whole = client.completions.create(model="tiny:alice", prompt="word8", max_tokens=383, temperature=0)
        assert whole.choices[0].text == site.text("alice", "word8", 383)


def test_a_broken_engine_is_said_to_be_broken(site: Site):
    with running(site) as server:
        client = server.client()
        stream = iter(client.completions.create(model="tiny:alice", prompt=PROMPT, max_tokens=1900, stream=True))
        next(stream)

        def fail(*_) -> None:
            raise RuntimeError("the device is gone, and word5 with it")

        server.service.engine._batching._assign_slots = fail
        with pytest.raises(APIError, match="takes no requests at the moment"):
            list(stream)
        for path in ("/health", "/ready"):
            assert send(server, "GET", path)[0] == 503
        with pytest.raises(InternalServerError) as caught:
            client.completions.create(model="tiny", prompt=PROMPT)
        assert caught.value.status_code == 503
        assert server.service.engine.running == 0 and server.service.engine.pool.stats()["in_use"] == 0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_client_that_leaves_the_line_for_a_slot_does_not_get_one(site: Site):
    """Its place in the line comes up later, and the slot is given back."""
    with running(site, slots=1) as server, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        engine, address = server.service.engine, urlparse(server.url)
        body = json.dumps({"model": "tiny:team/bob", "prompt": PROMPT})
        head = f"Authorization: Bearer {API_KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with engine.pool.acquire(["alice"]):
            with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
                connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{body}".encode())
                until(lambda: engine.pool.stats()["waiting"] == 1)
            until(lambda: engine.waiting == 0)
        until(lambda: engine.pool.stats()["loads"] == 2)
        until(lambda: engine.pool.stats()["in_use"] == 0)
    # Given back, not just lost and found.
    assert not [one for one in told if "a lease was dropped" in str(one.message)]


def test_a_request_that_the_engine_does_not_take_leaves_nothing_behind(site: Site, monkeypatch):
    with running(site) as server:
        engine, body = server.service.engine, json.dumps({"model": "tiny:alice", "prompt": PROMPT})
        monkeypatch.setattr(engine._batching, "add_request", lambda *_, **__: None)
        assert send(server, "POST", "/v1/completions", body)[0] == 503
        assert engine.running == 0 and engine.pool.stats()["in_use"] == 0
        assert not engine._batching.slots and not engine._batching.output_router.result_handlers
        monkeypatch.undo()
        assert send(server, "POST", "/v1/completions", body)[0] == 200


def test_the_wait_for_a_thread_is_part_of_the_wait_for_a_slot(site: Site, monkeypatch):
    with running(site) as server:
        engine, given = server.service.engine, []
        monkeypatch.setattr(engine.pool, "acquire", lambda names, timeout: given.append((names, timeout)))
        engine._acquire("alice", time.monotonic() - 1)
        assert given == [(["alice"], 0.0)]


def test_of_a_request_that_is_taken_in_part_nothing_is_computed(site: Site, monkeypatch):
    """There is room in the queue for the first of its answers only."""
    with running(site, limits=Limits(queue=1)) as server:
        engine, cancelled = server.service.engine, []
        cancel = engine._batching.cancel_request
        monkeypatch.setattr(engine._batching, "cancel_request", lambda name: cancelled.append(name) or cancel(name))
        body = json.dumps({"model": "tiny:alice", "prompt": PROMPT, "max_tokens": 900, "n": 2})
        assert send(server, "POST", "/v1/completions", body)[0] == 429
        assert len(cancelled) == 1
        until(lambda: engine.running == 0)
        assert engine.pool.stats()["in_use"] == 0


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_before_the_loop_is_not_lost(site: Site, monkeypatch, sign: signal.Signals):
    before, run = signal.getsignal(sign), Server.run

    def run_late(server: Server) -> None:
        signal.raise_signal(sign)
        assert server.should_exit
        run(server)

    monkeypatch.setattr(Server, "run", run_late)
    with built(site) as service:
        assert serve(service, "127.0.0.1", 0, 10) == 0
        assert service.draining and not service.engine.alive
    assert signal.getsignal(sign) is before


def test_a_start_that_is_cancelled_leaves_no_thread(site: Site, monkeypatch):
    """It would keep the process alive. asyncio.run cancels what runs when Ctrl-C comes, and uvicorn is not alone."""
    monkeypatch.setattr(SlotBatching, "capacity", 0)  # It is never ready.

    async def start_and_cancel() -> None:
        app, batching = create_app(service), service.engine._batching

        async def run() -> None:
            async with app.router.lifespan_context(app):
                pass

        starting = asyncio.create_task(run())
        try:
            while not batching.is_running():
                await asyncio.sleep(0.01)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            assert not batching.is_running()
        finally:
            await service.engine.stop()

    with built(site) as service:
        asyncio.run(start_and_cancel())
