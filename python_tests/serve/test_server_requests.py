"""Requests that cannot be answered get their status and a sentence, and the server goes on."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlparse

import pytest

from loraxs_ext.serve.server.limits import Limits

from .server_scenes import ADMIN_KEY, API_KEY, Running, Site, make_site, running, send

LIMITS = Limits(body=8192, adapter=1 << 18, context=512, choices=4, stop=2, queue=6, slot_seconds=0.3, body_seconds=1.0)
GOOD = {"model": "tiny:alice", "prompt": "word5", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def server(site):
    with running(site, limits=LIMITS, slots=1) as server:
        yield server


def post(server: Running, changes: dict, path: str = "/v1/completions"):
    return send(server, "POST", path, json.dumps({**GOOD, **changes}))


def check_error(answer, status: int, sentence: str) -> None:
    found, _, body = answer
    assert found == status, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert sentence in body["error"]["message"]


@pytest.fixture(autouse=True)
def _lives_on(server):
    yield
    deadline = time.monotonic() + 10
    while (server.service.engine.running or server.service.engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.service.engine.running == server.service.engine.waiting == 0
    assert server.service.engine.pool.stats()["in_use"] == 0
    status, _, body = post(server, {})
    assert status == 200 and body["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_tokens": -1}, "max_tokens: Input should be greater"),
        ({"max_tokens": 10**30}, "max_tokens: "),
        ({"max_tokens": 512}, "expected at most 512 tokens of prompt and answer together, got 1 + 512"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e400}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 1 << 70}, "seed"),
        ({"n": 0}, "n: "),
        ({"n": 5}, "n: expected at most 4"),
        ({"n": 10**9}, "n: expected at most 4"),
        ({"prompt": ["word5"] * 5}, "n: expected at most 4"),
        ({"prompt": ""}, "prompt: expected at least one token"),
        ({"prompt": []}, "prompt: expected at least one"),
        ({"prompt": [50]}, "prompt: expected at least one token, each from 0 to 49"),
        ({"prompt": [-5]}, "prompt"),
        ({"prompt": [[5], []]}, "prompt: expected at least one token"),
        ({"prompt": {"word": 5}}, "prompt: expected a text, tokens, or a list of either"),
        ({"prompt": [True]}, "prompt: expected a text, tokens, or a list of either"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": None}, "prompt: Field required"),
        ({"model": None}, "model: Field required"),
        ({"model": 5}, "model"),
        ({"stop": ["a", "b", "c"]}, "stop: expected at most 2"),
        ({"stop": ["a"] * 1500}, "stop: expected at most 2"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop: expected a text or a list of texts"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 1}, "logprobs: this server does not support it"),
        ({"logprobs": 0}, "logprobs: this server does not support it"),
        ({"presence_penalty": 0.5}, "presence_penalty: this server does not support it"),
        ({"logit_bias": {"5": 1}}, "logit_bias: this server does not support it"),
        ({"echo": True}, "echo: this server does not support it"),
        ({"beams": 4}, "beams: this server does not support it"),
    ],
    ids=str,
)
def test_bad_fields(server: Running, changes, sentence):
    check_error(post(server, changes), 422, sentence)


def test_what_asks_for_nothing_is_accepted(server: Running):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": None, "echo": False, "logit_bias": {}}
    assert post(server, {**neutral, "user": "me", "best_of": 1})[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[" * 4000, 422),
        (b"[]", 422),
        (b"\xff\xfe", 422),
        (b'{"model": ' + b"9" * 5000 + b"}", 422),
        (b'{"model": "tiny", "prompt": "' + b"a" * 9000 + b'"}', 413),
    ],
    ids=["empty", "cut", "deep", "list", "not text", "long number", "large"],
)
def test_bad_bodies(server: Running, body, status):
    check_error(send(server, "POST", "/v1/completions", body), status, "body: expected")


def test_a_large_body_without_a_length(server: Running):
    answer = send(server, "POST", "/v1/completions", iter([b"a" * 5000] * 3))
    check_error(answer, 413, "body: expected at most 8192 bytes")


@pytest.mark.parametrize(
    ("length", "status"), [(10**15, 413), (100, 408)], ids=["far too large, refused before it is read", "does not come"]
)
def test_a_body_that_is_not_sent(server: Running, length, status):
    address = urlparse(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        head = f"Authorization: Bearer {API_KEY}\r\nContent-Type: application/json\r\nContent-Length: {length}"
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(f"HTTP/1.1 {status}".encode())


def test_other_content_types(server: Running):
    headers = {"Content-Type": "text/plain"}
    check_error(send(server, "POST", "/v1/completions", json.dumps(GOOD), **headers), 415, "application/json")


@pytest.mark.parametrize(
    "model",
    [
        "",
        "other",
        "tiny:",
        "tiny:nobody",
        "tiny:../store",
        "tiny:/etc/passwd",
        "tiny:a\0b",
        "tiny:" + "a" * 600,
        "alice",
        "tiny/alice",
        "tiny.alice",
    ],
    ids=lambda model: model[:20].encode("unicode_escape").decode(),
)
def test_unknown_models(server: Running, model):
    check_error(post(server, {"model": model}), 404, "there is no model")
    check_error(send(server, "GET", f"/v1/models/{quote(model or ' ', safe='')}"), 404, "there is no model")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": "tool", "content": "a"}],
        "word5",
        [{"role": "user", "content": [{"type": "image"}]}],
    ],
    ids=["none", "no content", "role", "text", "image"],
)
def test_bad_messages(server: Running, messages):
    answer = send(server, "POST", "/v1/chat/completions", json.dumps({"model": "tiny", "messages": messages}))
    check_error(answer, 422, "messages")
    assert answer[2]["error"]["param"] in ("messages", "messages.0.content", "messages.0.role")


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "9" * 50, "x", "²"])
def test_pages_of_models_are_limited(server: Running, limit):
    check_error(send(server, "GET", f"/v1/models?limit={quote(limit)}"), 422, "limit: expected 1 to 1000")


@pytest.mark.parametrize("key", ["", "wrong-key-0123456789", ADMIN_KEY, API_KEY + "x", API_KEY[:-1], "Schlüssel"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/metrics", "/api/state"])
def test_wrong_keys(server: Running, path, key):
    key = key.encode().decode("latin-1")
    method = "POST" if path == "/v1/completions" else "GET"
    check_error(send(server, method, path, json.dumps(GOOD) if method == "POST" else None, key=key), 401, "valid key")


@pytest.mark.parametrize("path", ["/metrics%0A", "//metrics", "/v1%0A/models", "/nothing", "/METRICS"])
def test_another_spelling_of_a_path_is_no_way_around_the_key(server: Running, path):
    check_error(send(server, "GET", path, Authorization=None), 401, "valid key")
    check_error(send(server, "GET", path), 404, "no such route")


def test_no_key(server: Running):
    check_error(send(server, "GET", "/v1/models", Authorization=None), 401, "valid key")
    check_error(send(server, "GET", "/v1/models", Authorization=API_KEY), 401, "valid key")


def test_routes(server: Running):
    check_error(send(server, "GET", "/v1/nothing"), 404, "no such route")
    check_error(send(server, "GET", "/v1/completions"), 405, "Method Not Allowed")
    check_error(send(server, "PUT", "/v1/../admin/adapters/a"), 404, "no such route")
    for path in ("/health", "/ready", "/", "/page/page.js"):
        assert send(server, "GET", path, key="")[0] == 200


@pytest.mark.parametrize("given", ["job.7_a-b", "<script>", "a b", "a" * 65, "é", ""])
def test_the_id_of_a_request_is_the_clients_if_it_is_harmless(server: Running, given):
    found = send(server, "GET", "/health", **{"X-Request-ID": given.encode()})[1]["X-Request-ID"]
    assert found == given if given == "job.7_a-b" else re.fullmatch("[0-9a-f]{32}", found)


def test_a_full_queue_and_a_slot_that_does_not_come_free(server: Running):
    """The only slot is alice's, for as long as her long answers run."""
    long = {"max_tokens": 500}
    with ThreadPoolExecutor(12) as threads:
        first = [threads.submit(post, server, long) for _ in range(4)]
        while server.service.engine.running < 4:
            time.sleep(0.005)
        waiting = [threads.submit(post, server, {"model": "tiny:team/bob"}) for _ in range(2)]
        while server.service.engine.waiting < 2:
            time.sleep(0.005)
        refused = post(server, {})
        check_error(refused, 429, "too many requests: 6 answers are waiting or running")
        assert refused[1]["Retry-After"] == "1"
        for answer in (future.result() for future in waiting):
            if answer[0] != 200:
                check_error(answer, 503, "no slot came free")
                assert answer[1]["Retry-After"] == "1"
        assert any(future.result()[0] == 503 for future in waiting)
        assert [future.result()[0] for future in first] == [200] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_lets_go_of_its_adapter(server: Running, stream):
    address = urlparse(server.url)
    body = json.dumps({**GOOD, "max_tokens": 500, "stream": stream})
    head = f"Authorization: Bearer {API_KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    before = server.service.metrics.registry.get_sample_value("loraxs_completion_tokens_total")
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{body}".encode())
        while not server.service.engine.running:
            time.sleep(0.002)
    start = time.monotonic()
    while server.service.engine.running:
        time.sleep(0.002)
        assert time.monotonic() - start < 10
    after = server.service.metrics.registry.get_sample_value("loraxs_completion_tokens_total")
    assert after - before < 500


def test_metrics_and_state(server: Running):
    post(server, {})
    status, headers, text = send(server, "GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['loraxs_requests_total{route="completions",status="200"}']) >= 1
    assert float(lines["loraxs_completion_tokens_total"]) >= 2
    assert float(lines["loraxs_store_adapters"]) == 3 and float(lines["loraxs_slots"]) == 1
    assert "alice" not in text and "word5" not in text
    state = send(server, "GET", "/api/state")[2]
    assert state["model"] == "tiny" and state["chat"] and state["store"]["adapters"] == 3 and state["context"] == 512
    assert 0 <= state["hit_rate"] <= 1 and state["latency_p99"] >= state["latency_p50"] > 0
