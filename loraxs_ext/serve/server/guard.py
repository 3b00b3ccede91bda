"""In front of all routes: who may use them, how much may be sent, and a line in the log for every answer."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from .errors import ApiError
from .logs import log
from .service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# First parts of paths that need no key: the page, and what tells whether the server is well. All others do.
_FOR_ALL = {"", "page", "health", "ready"}
_FOR_ADMINISTRATORS = {"admin"}
# A client that is still sending would not read the answer, so up to this many times the limit is thrown away before it.
# For so many seconds at most, and so many without anything.
_DISCARDED = 8
_DISCARD_SECONDS, _SILENT_SECONDS = 5.0, 0.5


class Guard:
    """An ASGI application around another one.

    Args:
        app: what requests go to.
        service: with limits, keys and counters.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        # Handlers add to it what the log should say.
        about: dict[str, Any] = {}
        scope["loraxs"] = {"id": id, "about": about}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        body = _Body(receive, *self._limits(scope["path"]))
        try:
            try:
                self._check_key(scope["path"], headers.get(b"authorization"))
                _check_path(scope["path"])
                body.expect(headers.get(b"content-length"))
            except ApiError as error:
                if error.status == 413:
                    await body.discard()
                await answer(error)(scope, receive, send_with_id)
            else:
                await self._app(scope, body.receive, send_with_id)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("endpoint"), "__name__", "none")
            self._service.metrics.answered(route, status, seconds)
            log(
                "request", id=id, method=scope["method"], route=route, status=status, seconds=round(seconds, 4), **about
            )

    def _limits(self, path: str) -> tuple[int, float]:
        limits = self._service.limits
        return limits.adapter if _first(path) in _FOR_ADMINISTRATORS else limits.body, limits.body_seconds

    def _check_key(self, path: str, authorization: bytes | None) -> None:
        first, service = _first(path), self._service
        if first in _FOR_ADMINISTRATORS:
            if not service.admin_keys:
                raise ApiError(403, "this server was started without a key for its administrator", code="no_admin")
            keys = service.admin_keys
        elif first in _FOR_ALL or not service.api_keys:
            return
        else:
            keys = service.api_keys
        if not keys.accept(authorization):
            raise ApiError(
                401,
                "expected a valid key in the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _Body:
    """What a client sends, up to a size and a time."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive, self._limit = receive, limit
        self._deadline = time.monotonic() + seconds
        self._bytes, self._complete = 0, False

    def expect(self, length: bytes | None) -> None:
        """Raise ApiError if the client says that it will send too much."""
        if length is not None and (not length.isdigit() or int(length) > self._limit):
            raise self._too_large()

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="timeout") from None
        if self._count(message) > self._limit:
            await self.discard()
            raise self._too_large()
        return message

    async def discard(self) -> None:
        """Read what is still coming, within reason."""
        end = time.monotonic() + _DISCARD_SECONDS
        while not self._complete and self._bytes <= _DISCARDED * self._limit and time.monotonic() < end:
            try:
                self._count(await asyncio.wait_for(self._receive(), _SILENT_SECONDS))
            except asyncio.TimeoutError:
                return

    def _count(self, message: Message) -> int:
        self._bytes += len(message.get("body", b""))
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return self._bytes

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self._limit} bytes", code="body_too_large")


def answer(error: ApiError) -> JSONResponse:
    """The response that an error is."""
    return JSONResponse(error.body(), error.status, error.headers)


def _check_path(path: str) -> None:
    # Starlette takes a path with a line break at its end for the one without, and an adapter's name ends there.
    if "\n" in path:
        raise ApiError(404, "there is no such route: the path has a line break")


def _first(path: str) -> str:
    return path.lstrip("/").partition("/")[0]
