"""Errors as OpenAI's clients expect them: one type, mapped to a response in one place.

ApiError            what a route answers instead; has a status
ClientGone          nobody is left to answer
Overloaded          of the worker: 429
WorkerError         of the worker: 503
MedusaError         the client's fault: 400
any other           ours: 500, and a traceback in the log, never in the answer
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from model.errors import MedusaError
from model.serving.worker.messages import Failed
from model.serving.worker.protocol import Overloaded, WorkerError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_MAX_SHOWN = 120  # characters of a bad value
_MAX_MESSAGE = 500  # characters of what the worker says


class ApiError(Exception):
    """A request that cannot be answered.

    param: the field at fault. retry_after_s: for a full or unready server.
    """

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
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after_s)))

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, other),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """Return the error as a response."""
        return json_response(self.body(), self.status, self.headers)


class ClientGone(Exception):
    """The client has closed the connection: nobody reads what would be answered."""


def dump(value: Any) -> bytes:
    """Return JSON in ASCII.

    So it has no line breaks, U+2028 or lone surrogates that a client or SSE could trip over.
    """
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON response."""
    return Response(dump(value), status, headers, "application/json")


def not_ready() -> ApiError:
    """Return the error for a worker that loads, restarts or closes."""
    return ApiError(503, "the model is not ready yet", code="not_ready", retry_after_s=5)


def shown(value: Any) -> str:
    """Return a client's value in short, in ASCII."""
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


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


def of_failure(failed: Failed) -> ApiError:
    """Return a sequence's failure as an error."""
    lines = failed.message.splitlines() or ["failed"]
    status = 400 if failed.kind == "bad_request" else 500
    return ApiError(status, lines[0][:_MAX_MESSAGE])


def of_exception(error: Exception) -> ApiError:
    """Return what the client is to know of any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        message = str(error)
        return ApiError(429, message, code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, WorkerError):
        return ApiError(503, str(error), code="not_ready", retry_after_s=5)
    if isinstance(error, MedusaError):
        return ApiError(400, str(error))
    return ApiError(500, "internal error; the server's log says more")


async def _answer_error(request: Request, error: Exception) -> Response:
    return of_exception(error).response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"there is no {shown(request.url.path)}"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed here"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for it; only the metrics see it


# Every exception that can leave a route.
EXCEPTION_HANDLERS: dict[Any, ExceptionHandler] = {
    ApiError: _answer_error,
    Overloaded: _answer_error,
    MedusaError: _answer_error,
    Exception: _answer_error,
    HTTPException: _answer_http_error,
    ClientGone: _answer_nobody,
    ClientDisconnect: _answer_nobody,
}
