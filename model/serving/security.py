"""Who may ask, from where, and how much at once: Host and Origin, key, size and time of the body.

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

from model.serving.errors import ApiError, shown

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

    A rebinding page needs a name of its own, so where the server listens on all addresses any literal one is fine.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Collection[str], origins: Collection[str]) -> None:
        self._app, self._origins = app, set(origins)
        self._names = {name.lower().strip("[]") for name in (*LOCAL, host, *allowed)}
        bound = _address(host)
        self._any_address = bound is not None and bound.is_unspecified

    def _ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return bool(name) and (
            name in self._names or "*" in self._names or (self._any_address and _address(name) is not None)
        )

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._ours(host):
            return ApiError(403, f"Host {shown(host)} is not allowed; ALLOWED_HOSTS names more", code="host")
        own = origin is None or origin.partition("://")[2] == host
        if not own and not self._origins & {origin, "*"}:
            return ApiError(403, f"Origin {shown(origin)} is not allowed; CORS_ORIGINS names some", code="origin")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal.response() if refusal else self._app)(scope, receive, send)


class KeyCheck:
    """Asks for `Authorization: Bearer KEY`, except on open paths. Compares in constant time; keeps only a hash."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]) -> None:
        self._app, self._open = app, set(open_paths)
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
    """Stops bodies that are too large, counted while they arrive, or too slow. The route that reads gets the error."""

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body under watch."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = ApiError(413, f"the body is larger than {self._most:,} bytes (MAX_BODY_BYTES)", code="too_large")
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:19]) > self._most:
            await too_large.response()(scope, receive, send)
            return
        deadline, size, whole = monotonic() + self._seconds, 0, False

        async def watched() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self._seconds:g} s", code="timeout") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._most:
                raise too_large
            return message

        await self._app(scope, watched, send)
