"""An OpenAI-compatible server on this machine that misbehaves as each prompt's first word says."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret"


class Server(ThreadingHTTPServer):
    """Keeps what it was asked. most: requests that were under way at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def prompts(self) -> list[str]:
        """Return all prompts as they were asked, retries too."""
        return [body.get("prompt") or body["messages"][-1]["content"] for _, body, _ in self.asked]

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients hang up on purpose."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body, self.headers["Authorization"]))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        self.answer(body, body.get("prompt") or body["messages"][-1]["content"])

    def leave(self) -> None:
        """Count a request as answered, before the client reads that and asks the next one."""
        with self.server.lock:
            self.server.now -= 1

    def answer(self, body: dict[str, Any], prompt: str) -> None:
        kind, seen = prompt.split()[0], self.server.prompts().count(prompt)
        if kind == "slow" or (kind == "late" and seen == 1):
            time.sleep(0.5)
        if kind == "fails" or (kind == "flaky" and seen < 3):
            return self.send(500, b"Internal Server Error")
        if kind == "busy" and seen == 1:
            return self.send(429, b"{}", {"Retry-After": "0"})
        if kind == "wait" and seen == 1:
            date = formatdate(time.time() + 2, usegmt=True)
            again = {"seconds": "1", "date": date, "nonsense": "soon"}[prompt.split()[1]]
            return self.send(429, b"{}", {"Retry-After": again})
        if kind == "torn" and seen == 1:
            self.close_connection = True
            return self.send(200, b"{", {"Content-Length": "100"})
        if kind in ("refused", "unfit"):
            return self.send(401 if kind == "refused" else 400, f"bad key\n{KEY}".encode())
        if kind in ("nonsense", "empty", "list", "null") or (kind == "mad" and seen == 1):
            bodies = {
                "empty": b'{"choices": [{"text": " "}]}',
                "list": b"[1]",
                "null": b'{"choices": null}',
            }
            return self.send(200, bodies.get(kind, b"<html>\xff</html>"))
        if kind == "hangup":
            self.close_connection = True
            return self.leave()
        time.sleep(0.02)
        text = f"answer to {prompt}"
        choice = (
            {"text": text}
            if "prompt" in body
            else {"message": {"role": "assistant", "content": text}}
        )
        reason = "length" if kind == "long" else "stop"
        return self.send(
            200, json.dumps({"choices": [{**choice, "finish_reason": reason}]}).encode()
        )

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.leave()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a server in a thread."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
