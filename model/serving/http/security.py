"""Security: who may ask, from where, and how much: Host and Origin, key, size and time of the body.

Plain ASGI middleware. Knows nothing of models and routes, except which paths need no key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Collection
from time import monotonic
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.serving.http.errors import ApiError, shown

LOCAL = ("localhost", "127.0.0.1", "::1")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


class HostCheck:
    """Refuses names that aren't ours (DNS rebinding) and pages of other origins.

    A rebinding page needs a name of its own: where the server listens on all addresses, any
    literal one is fine.
    """

    def __init__(
        self, app: ASGIApp, host: str, allowed: Collection[str], origins: Collection[str]
    ) -> None:
        self._app = app
        self._origins = set(origins)
        self._names = {name.lower().strip("[]") for name in (*LOCAL, host, *allowed)}
        bound = _address(host)
        self._any_address = bound is not None and bound.is_unspecified

    def _ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if not name:
            return False
        if name in self._names or "*" in self._names:
            return True
        return self._any_address and _address(name) is not None

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._ours(host):
            message = f"Host {shown(host)} is not allowed; ALLOWED_HOSTS names more"
            return ApiError(403, message, code="host")
        origin = headers.get("origin")
        own = origin is None or origin.partition("://")[2] == host
        if not own and not self._origins & {origin, "*"}:
            message = f"Origin {shown(origin)} is not allowed; CORS_ORIGINS names some"
            return ApiError(403, message, code="origin")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        answer = refusal.response() if refusal else self._app
        await answer(scope, receive, send)


class KeyCheck:
    """Asks for `Authorization: Bearer KEY`, except on open paths.

    Compares in constant time; keeps only a hash.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]) -> None:
        self._app = app
        self._open = set(open_paths)
        self._hash = hashlib.sha256(key.encode()).digest()

    def _right(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._hash)
        return same and scheme.lower() == b"bearer"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on or refuse it."""
        if scope["type"] != "http" or scope["path"] in self._open or self._right(scope):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer …",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)


class BodyLimit:
    """Stops bodies that are too large, counted while they arrive, or too slow.

    The route that reads the body gets the error.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body under watch."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body is larger than {self._max_bytes:,} bytes (MAX_BODY_BYTES)"
        too_large = ApiError(413, message, code="too_large")
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:19]) > self._max_bytes:
            await too_large.response()(scope, receive, send)
            return
        await self._app(scope, self._watched(receive, too_large), send)

    def _watched(self, receive: Receive, too_large: ApiError) -> Receive:
        """Return `receive` with size and time of the body under watch."""
        deadline = monotonic() + self._timeout_s
        size = 0
        complete = False

        async def watched() -> Message:
            nonlocal size, complete
            if complete:  # what comes now is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - monotonic()))
            except asyncio.TimeoutError:
                text = f"the body did not arrive within {self._timeout_s:g} s"
                raise ApiError(408, text, code="timeout") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._max_bytes:
                raise too_large
            return message

        return watched
