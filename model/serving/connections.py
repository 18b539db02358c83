"""The web server's connections: what ends them when the server stops, and when a client keeps silent."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from model.serving.protocol import Worker


class Server(uvicorn.Server):
    """Ends the texts when it is stopped: while it waits for its connections, not after, as a lifespan would."""

    def __init__(self, config: uvicorn.Config, worker: Worker, deadline_s: float) -> None:
        super().__init__(config)
        self._worker, self._deadline_s = worker, deadline_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running texts finish until the deadline, tell those that do not, and close all connections."""
        closing = asyncio.create_task(self._worker.close(self._deadline_s))
        await super().shutdown(sockets)
        if not self.force_exit:
            await closing


def protocol(head_s: float) -> type[asyncio.Protocol]:
    """Return the protocol of a connection that is closed when so many seconds bring no whole request head."""

    class Timed(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(head_s, self._close_silent)

        def _close_silent(self) -> None:
            if self.cycle is None:
                self.transport.close()

    return Timed
