"""Connections that misbehave are ended in time, and nobody else notices; several hundred at once are answered."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlparse

import pytest

from loraxs_ext.serve.server.limits import Limits

from .server_scenes import API_KEY, Running, Site, make_site, model_of, running, send

LIMITS = Limits(body=8192, queue=1024, body_seconds=1.0)
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
PROMPTS = ("word5", "word7 word8")
TOKENS = 12
LONG = 30.0  # seconds; only a broken server takes as long


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def server(site):
    with running(site, limits=LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def expected(site) -> dict[tuple[str | None, str], str]:
    """What each adapter says alone."""
    names = (None, "alice", "team/bob")
    return {(name, prompt): site.text(name, prompt, TOKENS) for name in names for prompt in PROMPTS}


@contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    address = urlparse(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=LONG) as connection:
        yield connection


def post(body: dict | bytes, *headers: str, key: str = API_KEY) -> bytes:
    """The bytes of a request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = [f"Authorization: Bearer {key}", "Content-Type: application/json", *headers]
    if not any(header.startswith("Transfer-Encoding") for header in headers):
        given.append(f"Content-Length: {len(content)}")
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", "Host: x", *given, "", ""])
    return head.encode() + content


def until_closed(connection: socket.socket, drip: bytes = b"") -> bytes:
    """What arrives until the server closes the connection, to which `drip` is sent again and again."""
    found, end = b"", time.monotonic() + LONG
    connection.settimeout(0.1)
    while time.monotonic() < end:
        try:
            if drip:
                connection.sendall(drip)
            part = connection.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            return found
        if not part:
            return found
        found += part
    raise AssertionError(f"the connection is still open; got {found[:200]!r}")


@pytest.mark.parametrize(
    ("first", "drip", "answers"),
    [
        (b"", b"", []),
        (b"GE", b"", [408]),
        (b"GET /health HTTP/1.1\r\nX: ", b"a", [408]),
        (HEALTH + b"GET /health HTTP/1.1\r\nX: ", b"a", [200, 408]),
        (HEALTH, b"", [200]),
        (post(b"", "Transfer-Encoding: chunked"), b"1\r\n \r\n", [408]),
        (post(b"", "Transfer-Encoding: chunked"), b"8000\r\n" + b"a" * 0x8000 + b"\r\n", [413]),
        (post(b"", "Transfer-Encoding: chunked", key="wrong"), b"1\r\n \r\n", [401]),
        (HEALTH[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", [200]),
        (b"\x16\x03\x01\x02\0\r\n\r\n", b"", [400]),
        (post(b"{}", "Content-Length: -5"), b"", [400]),
    ],
    ids=[
        "nothing", "half a line", "head drips", "second head drips", "silent", "body drips", "body without end",
        "body after 401", "body after 200", "TLS", "negative length",
    ],
)  # fmt: skip
def test_a_client_that_does_not_end_is_ended(server: Running, first, drip, answers):
    with connected(server) as connection:
        connection.sendall(first)
        found = until_closed(connection, drip)
    assert [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]] == answers
    if answers and answers[-1] >= 400:
        assert json.loads(found.rpartition(b"\r\n\r\n")[2])["error"]["message"]
    assert send(server, "GET", "/health")[0] == 200


def test_requests_one_behind_the_other(server: Running, expected):
    """Sent at once, answered in order."""
    body = {"model": "tiny:alice", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
    with connected(server) as connection:
        connection.sendall(post(body) + HEALTH + post({**body, "model": "tiny"}) + post({**body, "model": "no"}))
        found = until_closed(connection)
    parts = found.split(b"HTTP/1.1 ")[1:]
    assert [int(part[:3]) for part in parts] == [200, 200, 200, 404]
    answers = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in parts]
    assert answers[0]["choices"][0]["text"] == expected["alice", PROMPTS[0]]
    assert answers[1] == {"status": "ok"} and answers[2]["choices"][0]["text"] == expected[None, PROMPTS[0]]


def test_clients_that_leave_do_not_disturb_the_others(server: Running, expected):
    """Every other client goes away in the middle of its answer; the others get theirs, and nothing stays behind."""

    def leave(number: int) -> None:
        long = {"model": "tiny:alice", "prompt": "word5", "max_tokens": 900, "n": 2, "stream": number % 3 > 0}
        with connected(server) as connection:
            connection.sendall(post(long))
            if long["stream"]:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")

    cases = list(expected) * 8
    with ThreadPoolExecutor(24) as threads:
        gone = [threads.submit(leave, number) for number in range(24)]
        answers = list(threads.map(lambda case: ask(server, *case), cases))
        for future in gone:
            future.result()
    assert answers == [expected[case] for case in cases]
    end = time.monotonic() + LONG
    while server.service.engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert server.service.engine.running == server.service.engine.waiting == 0
    assert server.service.engine.pool.stats()["in_use"] == 0
    batching = server.service.engine._batching
    assert not batching.slots and not batching.output_router.result_handlers


def test_three_hundred_connections(server: Running, expected):
    cases = (list(expected) * 50)[:300]
    with ThreadPoolExecutor(300) as threads:
        answers = list(threads.map(lambda case: ask(server, *case), cases))
    assert answers == [expected[case] for case in cases]


def ask(server: Running, adapter: str | None, prompt: str) -> str:
    body = {"model": model_of(adapter), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    status, _, answer = send(server, "POST", "/v1/completions", json.dumps(body))
    assert status == 200, answer
    return answer["choices"][0]["text"]
