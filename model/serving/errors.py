"""Errors as OpenAI's clients expect them: one type, mapped to a response in one place. Never shows a traceback."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model.errors import MedusaError
from model.serving.jobs import Failed
from model.serving.protocol import Overloaded, WorkerError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_SHOWN = 120  # characters of a bad value


class ApiError(Exception):
    """A request that cannot be answered. param: the field at fault; retry_after_s: for a full or unready server."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after_s)))

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the error as a response."""
        return json_response(self.body(), self.status, self.headers)


class ClientGone(Exception):
    """The client has closed the connection: nobody reads what would be answered."""


def dump(value: Any) -> bytes:
    """Return JSON in ASCII: no line breaks, U+2028 or lone surrogates that a client or SSE could trip over."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(dump(value), status, headers, "application/json")


def not_ready() -> ApiError:
    """Return the error for a worker that loads, restarts or closes."""
    return ApiError(503, "the model is not ready yet", code="not_ready", retry_after_s=5)


def of_validation(error: ValidationError) -> ApiError:
    """Return the first of pydantic's complaints as a 400 that names field and value."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param)
    if not param:  # a rule between fields; its message names them
        return ApiError(400, message)
    return ApiError(400, f"{param}={shown(first['input'])}: {message}", param=param)


def shown(value: Any) -> str:
    """Return a client's value in short, in ASCII."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def of_failure(failed: Failed) -> ApiError:
    """Return what the worker says of a job as an error."""
    message = (failed.message.splitlines() or ["failed"])[0][:500]
    if failed.kind == "bad_request":
        return ApiError(400, message)
    return ApiError(500, message)


def of_exception(error: Exception) -> ApiError:
    """Return what the client is told of any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, WorkerError):
        return ApiError(503, str(error), code="not_ready", retry_after_s=5)
    if isinstance(error, MedusaError):
        return ApiError(400, str(error))
    return ApiError(500, "internal error; the server's log says more")


def add_handlers(app: FastAPI) -> None:
    """Map every exception that can leave a route to its response."""

    async def told(request: Request, error: Exception) -> Response:
        return of_exception(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {404: f"there is no {shown(request.url.path)}", 405: f"{request.method} is not allowed here"}
        text = message.get(error.status_code, error.detail)
        return ApiError(error.status_code, text, headers=error.headers).response()

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's number for it; nobody sees it but the metrics

    for kind in (ApiError, Overloaded, MedusaError, Exception):
        app.add_exception_handler(kind, told)
    app.add_exception_handler(HTTPException, http)
    for kind in (ClientGone, ClientDisconnect):
        app.add_exception_handler(kind, gone)
