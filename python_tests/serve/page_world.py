"""A server for the page whose every answer and failure a test decides, and the browser that looks at it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loraxs_ext.serve.server.page import page_routes

MODEL = "tiny"


@dataclass
class World:
    """What the server has and does; tests change it while it runs."""

    adapters: list[str] = field(default_factory=lambda: ["alice", "alan", "bob"])
    key: str | None = None
    chat: bool = True
    ready: bool = True
    broken: bool = False
    # Clear, answers stop after their first piece.
    flowing: threading.Event = field(default_factory=threading.Event)
    left: list[str] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    tokens: int = 0
    finished: int = 0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.flowing.set()

    def answer(self, model: str, prompt: str) -> list[str]:
        """The pieces of an answer."""
        return [f"{model} ", "says\n", f"«{prompt}» ", "ünïcode ", *(f"{n} " for n in range(20))]

    def state(self) -> dict:
        fast, slow = (0.25, 1.5) if self.finished else (None, None)
        return {
            "model": MODEL,
            "chat": self.chat,
            "ready": self.ready,
            "uptime_seconds": time.monotonic() - self.began,
            "context": 512,
            "store": {"adapters": len(self.adapters), "bytes": 12_300_000},
            "slots": {"slots": 16, "free": 11, "resident": 5, "in_use": 2, "pinned": 1},
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / max(1, self.hits + self.misses),
            "evictions": 1,
            "running": 0,
            "waiting": 0,
            "queue_limit": 1024,
            "latency_p50": fast,
            "latency_p99": slow,
            "tokens_per_second": self.tokens / 10,
        }

    def application(self) -> Starlette:
        routes = [
            *page_routes(),
            Route("/api/state", self._state),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "key: expected a valid API key")

    async def _state(self, request: Request) -> Response:
        if self.broken:
            return _error(503, "The store is being repaired.")
        return self._refusal(request) or JSONResponse(self.state())

    async def _models(self, request: Request) -> Response:
        prefix, limit = request.query_params["prefix"], int(request.query_params["limit"])
        names = [name for name in self.adapters if name.startswith(prefix)][:limit]
        ids = [*([MODEL] if not prefix else []), *(f"{MODEL}:{name}" for name in names)]
        return self._refusal(request) or JSONResponse({"object": "list", "data": [{"id": name} for name in ids]})

    async def _complete(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        chat = request.url.path.endswith("/chat/completions")
        if chat != self.chat:
            return _error(422, "this model has no chat template")
        base, _, adapter = body["model"].partition(":")
        if base != MODEL or (adapter and adapter not in self.adapters):
            return _error(404, f"model: there is no model {body['model']}")
        pieces = self.answer(body["model"], body["messages"][0]["content"] if chat else body["prompt"])
        pieces, reason = pieces[: body["max_tokens"]], "length" if len(pieces) > body["max_tokens"] else "stop"
        self.misses, self.hits = self.misses + 1, self.hits + 3
        if body.get("stream"):
            return StreamingResponse(self._stream(adapter, pieces, reason, chat), media_type="text/event-stream")
        self._count(len(pieces))
        text = "".join(pieces)
        return JSONResponse({"choices": [{"message": {"content": text}} if chat else {"text": text}]})

    async def _stream(self, adapter: str, pieces: list[str], reason: str, chat: bool) -> AsyncIterator[str]:
        try:
            for n, piece in enumerate(pieces):
                while n and not self.flowing.is_set():
                    await asyncio.sleep(0.01)
                choice = {"delta": {"content": piece}} if chat else {"text": piece}
                yield _event({"choices": [{**choice, "finish_reason": None}]})
            choice = {"delta": {}} if chat else {"text": ""}
            yield _event({"choices": [{**choice, "finish_reason": reason}]})
            yield _event({"choices": [], "usage": {"completion_tokens": len(pieces)}})
            yield "data: [DONE]\n\n"
            self._count(len(pieces))
        except asyncio.CancelledError:
            self.left.append(adapter)
            raise

    def _count(self, tokens: int) -> None:
        self.tokens, self.finished = self.tokens + tokens, self.finished + 1


def complete(url: str, adapter: str | None, prompt: str, most: int = 64) -> str:
    """What the API itself answers."""
    model = MODEL if adapter is None else f"{MODEL}:{adapter}"
    body = {"model": model, "max_tokens": most, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    request = HttpRequest(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=10) as response:
        return json.load(response)["choices"][0]["message"]["content"]


@contextmanager
def serving(application: Starlette) -> Iterator[str]:
    """An application behind a port of this machine; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)
        assert not thread.is_alive()


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=status)


def _event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"
