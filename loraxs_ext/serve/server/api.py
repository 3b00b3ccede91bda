"""The application: OpenAI's routes, those of the administrator, and what tells how the server is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .admin import delete_adapter, put_adapter
from .answers import Answers
from .errors import ApiError
from .guard import Guard, answer
from .page import page_routes
from .protocol import ChatRequest, CompletionRequest, parse
from .service import Service

T = TypeVar("T")


def create_app(service: Service) -> Starlette:
    """The ASGI application of a service. It starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            # Its thread is there before `start` returns, which may be cancelled.
            await service.engine.start()
            yield
        finally:
            await service.engine.stop()

    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/admin/adapters/{name:path}", put_adapter, methods=["PUT"]),
        Route("/admin/adapters/{name:path}", delete_adapter, methods=["DELETE"]),
        Route("/api/state", state),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        *page_routes(),
    ]
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected}
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, service=service)],  # type: ignore[arg-type]
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def chat_completions(request: Request) -> Response:
    """The answer to a conversation."""
    return await _complete(request, ChatRequest)


async def completions(request: Request) -> Response:
    """What follows a prompt."""
    return await _complete(request, CompletionRequest)


async def _complete(request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page in a browser may send anything else anywhere without asking.
        raise ApiError(415, "expected a body of Content-Type application/json", code="invalid_content_type")
    wanted = parse(kind, await request.body())
    context = request.scope["loraxs"]
    answers = Answers(_service(request), wanted, context["id"])
    try:
        await _unless_gone(request, answers.start())
        if wanted.stream:
            watch = asyncio.create_task(_cancel_when_gone(request, answers))
            events = _events(answers, watch, partial(_note, context["about"], answers))
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        body = await _unless_gone(request, answers.whole())
    finally:
        _note(context["about"], answers)
    return JSONResponse(body)


async def _events(answers: Answers, watch: asyncio.Task[None], note: Any) -> AsyncIterator[bytes]:
    try:
        async for event in answers.events():
            yield event
    finally:
        answers.cancel()
        watch.cancel()
        note()


def _note(about: dict[str, Any], answers: Answers) -> None:
    """What the log says about a request."""
    usage = answers.usage()
    about.update(adapter=answers.adapter, prompt_tokens=usage["prompt_tokens"], tokens=usage["completion_tokens"])


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            # Nobody reads this; it is for the log.
            raise ApiError(499, "the client went away", code="client_gone")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _cancel_when_gone(request: Request, answers: Answers) -> None:
    await _gone(request)
    answers.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def models(request: Request) -> Response:
    """The base model and a page of its adapters: `?prefix=`, `?after=` (an adapter or a model), `?limit=`."""
    service, query = _service(request), request.query_params
    limit = query.get("limit", "100")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= service.limits.page or len(limit) > 9:
        raise ApiError(422, f"limit: expected 1 to {service.limits.page}", param="limit", code="invalid_value")
    size = int(limit)
    prefix, after = query.get("prefix", ""), query.get("after")
    if after is not None:
        after = after.removeprefix(f"{service.name}:")
    first = after is None and not prefix
    try:
        names = await asyncio.to_thread(lambda: list(service.store.names(prefix, after or None, size + 1)))
    except UnicodeEncodeError:
        raise ApiError(422, "prefix: expected text that UTF-8 can hold", param="prefix") from None
    data = [_model(service, None)] if first else []
    data += [_model(service, name) for name in names[:size]]
    return JSONResponse({"object": "list", "data": data, "has_more": len(names) > size})


async def model(request: Request) -> Response:
    """One model."""
    service, name = _service(request), request.path_params["name"]
    return JSONResponse(_model(service, service.adapter_of(name)))


def _model(service: Service, adapter: str | None) -> dict[str, Any]:
    about = {"object": "model", "created": int(service.started), "owned_by": "loraxs"}
    if adapter is None:
        return {"id": service.name, **about}
    return {"id": f"{service.name}:{adapter}", **about, "parent": service.name}


async def state(request: Request) -> Response:
    """Numbers of this moment, for a page."""
    return JSONResponse(await asyncio.to_thread(_service(request).state), headers={"Cache-Control": "no-store"})


async def health(request: Request) -> Response:
    """Whether the process is worth keeping."""
    alive = _service(request).engine.alive
    return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)


async def ready(request: Request) -> Response:
    """Whether requests should be sent here."""
    is_ready = _service(request).ready
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    text = await asyncio.to_thread(_service(request).metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _api_error(_: Request, error: ApiError) -> Response:
    return answer(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    # Starlette's own: no such route, wrong method, a form that is none.
    message = "there is no such route" if error.status_code == 404 else error.detail
    return answer(ApiError(error.status_code, message, headers=error.headers))


async def _unexpected(_: Request, error: Exception) -> Response:
    return answer(ApiError(500, "the server failed to answer; its log says where", code="internal_error"))
