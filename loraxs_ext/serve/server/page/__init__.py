"""The page at `/` of the server: live figures and a playground, without a build step or anything from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing inline and nothing from elsewhere; and the browser refuses to parse a string as HTML in the page's scripts.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> list[Route]:
    """The routes of the page for a Starlette or FastAPI application: `/` and its files below `/page/`.

    The page reads `/api/state`, `/v1/models`, `/v1/chat/completions` and `/v1/completions` of the same application,
    with the API key that its user types. Its own files hold no secret and need no key.
    """
    from starlette.routing import Route

    room = files(__name__)
    kinds = {file.name: kind for file in room.iterdir() for end, kind in _KINDS.items() if file.name.endswith(end)}
    paths = {"/" if name == "index.html" else f"/page/{name}": name for name in sorted(kinds)}
    return [Route(path, _serving((room / name).read_bytes(), kinds[name])) for path, name in paths.items()]


def _serving(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    from starlette.responses import Response

    async def page(_: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return page
