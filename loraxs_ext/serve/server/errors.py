"""Errors of the server, in the shape that clients of OpenAI's API expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An answer that is not a success.

    Args:
        status: of HTTP.
        message: a sentence for the client. No prompt and no key may be in it.
        param: field of the request that is meant.
        code: for programs.
        headers: of the answer, beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def retry(status: int, message: str, code: str) -> ApiError:
    """An answer to a request that may succeed a second later."""
    return ApiError(status, message, code=code, headers={"Retry-After": "1"})


def unknown_model(name: str) -> ApiError:
    """There is no such model or adapter."""
    shown = ascii(name[:200])
    return ApiError(404, f"model: there is no model {shown}", param="model", code="model_not_found")
