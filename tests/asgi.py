"""Applications under test: on a real socket, or without a network.

Without one, a client reads and leaves when it likes.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from model.serving.http.connections import Server, listen, protocol
from model.serving.worker.protocol import Worker


@contextmanager
def on_a_socket(app: Starlette, worker: Worker, head_s: float = 30.0) -> Iterator[str]:
    """Serve an app in a thread; yield its address."""
    with listen("127.0.0.1", 0) as listener:
        server = Server(uvicorn.Config(app, log_config=None, http=protocol(head_s)), worker, 0.5)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


class Connection:
    """One request, spoken in ASGI itself, whose client leaves when it likes."""

    def __init__(
        self, app: Starlette, body: dict[str, Any] | bytes, path: str = "/v1/completions"
    ) -> None:
        self.sent: list[Any] = []
        self.left = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self._body: bytes | None = body if isinstance(body, bytes) else json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST" if self._body else "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost")],
            "scheme": "http",
            "server": ("localhost", 80),
            "client": None,
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._body is not None:
            body = self._body
            self._body = None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.sent.append(message)

    async def answer(self) -> tuple[int, str]:
        """Return status and body when all is answered."""
        await self.task
        return self.sent[0]["status"], b"".join(m.get("body", b"") for m in self.sent).decode()
