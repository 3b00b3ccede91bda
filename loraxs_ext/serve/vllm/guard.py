"""In front of vLLM's routes: what a request uses stays on the disk, and what was replaced is asked for again.

vLLM's server remembers every answer of a resolver, so a replaced adapter would never be seen; and its workers read the
files of it again whenever they please, so a bounded cache could never remove one, for a worker that misses a file ends
the engine. The guard knows which adapter a request is about to use. For the time of the request it holds the files, and
makes vLLM forget an answer that is no longer right.

vLLM loads it through its entry points "vllm.endpoint_plugins", where VLLM_PLUGINS names it. It stands behind the check
of API keys.
"""

from __future__ import annotations

import asyncio
import json
import logging
from argparse import Namespace
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .plugin import NAME, AdapterResolver, Held

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_log = logging.getLogger(__name__)


class RequestGuard:
    """An ASGI application around another one.

    Args:
        app: what the requests go to.
        resolver: that vLLM asks.
        state: of vLLM's application; its `openai_serving_models` holds the answers that vLLM remembers.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], resolver: AdapterResolver, state: Any) -> None:
        self._app, self._resolver, self._state = app, resolver, state

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        held = None
        if scope["type"] == "http" and scope["method"] == "POST" and _says_json(scope):
            body, receive = await _read(receive)
            name = _model_of(body)
            held = await self._hold(name) if name else None
        try:
            await self._app(scope, receive, send)
        finally:
            if held is not None:
                held.release()

    async def _hold(self, name: str) -> Held | None:
        models = getattr(self._state, "openai_serving_models", None)
        if models is None or models.is_base_model(name):
            return None
        held = None
        try:
            held = await asyncio.to_thread(self._resolver.hold, models.model_config.model, name)
        except (ValueError, OSError, RuntimeError, ImportError) as reason:
            # vLLM asks the resolver, which says so again, and answers the request.
            _log.debug("adapter %r cannot be served: %s", name, reason)
        known = models.lora_requests.get(name)
        if known is not None and self._resolver.owns(known.lora_path):
            if held is None or known.lora_path != str(held.folder):
                await _forget(models, name)
        return held


async def _forget(models: Any, name: str) -> None:
    from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

    await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))


class GuardPlugin:
    """What vLLM's "vllm.endpoint_plugins" makes of the entry point: puts the guard around the routes."""

    name = NAME
    required_tasks = None

    def __init__(self) -> None:
        self._resolver: AdapterResolver | None = None

    def attach_router(self, app: Any) -> None:
        """Put the guard around all routes, if the resolver is registered."""
        from vllm.lora.resolver import LoRAResolverRegistry

        if NAME in LoRAResolverRegistry.get_supported_resolvers():
            self._resolver = LoRAResolverRegistry.get_resolver(NAME)
            self._resolver.guarded = True
            app.add_middleware(RequestGuard, resolver=self._resolver, state=app.state)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Note which ranks vLLM was started for."""
        if self._resolver is not None:
            self._resolver.max_rank = getattr(args, "max_lora_rank", None)


def _says_json(scope: Message) -> bool:
    kinds = [value for name, value in scope.get("headers", ()) if name.lower() == b"content-type"]
    return any(kind.partition(b";")[0].strip().lower() == b"application/json" for kind in kinds)


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The body, and what gives it once more."""
    messages = []
    while True:
        messages.append(await receive())
        if messages[-1]["type"] != "http.request" or not messages[-1].get("more_body"):
            break
    body = b"".join(message.get("body", b"") for message in messages)

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return body, again


def _model_of(body: bytes) -> str | None:
    """The model that a request names; None if it names none, or is no JSON, which vLLM will say."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = request.get("model") if isinstance(request, dict) else None
    return name if isinstance(name, str) else None
