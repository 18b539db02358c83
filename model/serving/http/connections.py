"""The web server's connections: the listening socket, and what ends a connection early.

That is a server that stops, a client that keeps silent, one that leaves, and a time limit.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvicorn
from starlette.types import Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from model.errors import UsageError
from model.serving.http.errors import ApiError, ClientGone
from model.serving.worker.protocol import Worker

ResultT = TypeVar("ResultT")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UsageError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"cannot listen on HOST={host}, PORT={port}: {why}") from None


class Server(uvicorn.Server):
    """Closes the worker when it is stopped.

    It does so while it waits for its connections, not after, as a lifespan would.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, deadline_s: float) -> None:
        super().__init__(config)
        self._worker = worker
        self._deadline_s = deadline_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish until the deadline, fail the rest, and close all connections."""
        closing = asyncio.create_task(self._worker.close(self._deadline_s))
        await super().shutdown(sockets)
        if not self.force_exit:
            await closing


def protocol(head_s: float) -> type[asyncio.Protocol]:
    """Return the protocol of a connection that must bring a whole request head in time."""

    class Timed(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(head_s, self._close_silent)

        def _close_silent(self) -> None:
            if self.cycle is None:
                self.transport.close()

    return Timed


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, ResultT], timeout_s: float
) -> ResultT:
    """Return what work returns; stop it when the client leaves or the time is up.

    receive: ASGI's, with the request's body already read.
    Raises ClientGone, or ApiError with status 504.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        done, _ = await asyncio.wait(
            {task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if gone in done:
            raise ClientGone
        raise ApiError(
            504,
            f"not finished after {timeout_s:g} s (REQUEST_TIMEOUT)",
            code="timeout",
            headers={"x-should-retry": "false"},  # OpenAI's client would send it all again
        )
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
