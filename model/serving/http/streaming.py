"""Server-sent events: an answer's chunks as they come, an error in between, the end mark."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model.serving.http.answers import Answer
from model.serving.http.connections import while_connected
from model.serving.http.errors import ClientGone, dump, of_exception
from model.serving.http.running_request import Choice, RunningRequest
from model.serving.worker.messages import Event, Finished, TextChunk

_LAST_EVENT_S = 1.0  # how long a client that no longer reads may take for the error at the end


def sse(data: dict[str, Any]) -> bytes:
    """Return one server-sent event.

    JSON in ASCII holds no line break of any kind, so a single line suffices.
    """
    return b"data: " + dump(data) + b"\n\n"


class EventStream(Response):
    """Streams the answer to a request. Errors before the first event get a status of their own.

    submitted: the context in which the request runs.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        request: RunningRequest,
        answer: Answer,
        submitted: contextlib.AbstractContextManager[None],
        timeout_s: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._request = request
        self._answer = answer
        self._submitted = submitted
        self._timeout_s = timeout_s
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit the request, and stream until it is finished, the client leaves or time is up."""
        with self._submitted:
            try:
                await while_connected(receive, self._stream(send), self._timeout_s)
            except ClientGone:
                return
            except Exception as error:
                if not self._begun:
                    raise
                api_error = of_exception(error)
                with contextlib.suppress(asyncio.TimeoutError):
                    last = self._send(send, sse(api_error.body()), last=True)
                    await asyncio.wait_for(last, _LAST_EVENT_S)
                if api_error.status == 500 and api_error is not error:  # ours: into the log
                    raise

    async def _stream(self, send: Send) -> None:
        opened = set[Choice]()
        async for batch in self._request.events():
            chunks = [
                chunk for choice, event in batch for chunk in self._chunks(choice, event, opened)
            ]
            await self._send(send, b"".join(map(sse, chunks)))
        closing = b"".join(map(sse, self._answer.closing()))
        await self._send(send, closing + b"data: [DONE]\n\n", last=True)

    def _chunks(
        self, choice: Choice, event: Event, opened: set[Choice]
    ) -> Iterable[dict[str, Any]]:
        """Yield the chunks for an event. opened: the choices that have begun; this one is added."""
        if choice not in opened:
            opened.add(choice)
            yield from self._answer.opening(choice)
        if isinstance(event, TextChunk):
            yield from self._answer.chunk(choice, event)
        elif isinstance(event, Finished):
            yield from self._answer.ending(choice)

    async def _send(self, send: Send, body: bytes, *, last: bool = False) -> None:
        if not self._begun:
            self._begun = True
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        if body or last:
            await send({"type": "http.response.body", "body": body, "more_body": not last})
