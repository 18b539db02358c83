"""Server-sent events: the chunks of an answer as they come, an error in the middle, and the mark at the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model.serving.answers import Answer
from model.serving.errors import ClientGone, dump, of_exception
from model.serving.jobs import Finished, Piece
from model.serving.texts import Text, Texts, while_connected

_LAST_WORD_S = 1.0  # how long a client that no longer reads may take for the error that ends its stream


def event(data: dict[str, Any]) -> bytes:
    """Return one event. JSON in ASCII holds no line break of any kind, so a single line suffices."""
    return b"data: " + dump(data) + b"\n\n"


class EventStream(Response):
    """Writes an answer while its texts come. Errors before the first event get a status of their own."""

    media_type = "text/event-stream"

    def __init__(self, texts: Texts, answer: Answer, seconds: float) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._texts, self._answer, self._seconds = texts, answer, seconds
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit the texts, and write until they are finished, the client leaves or the time is up."""
        async with self._texts:
            try:
                await while_connected(receive, self._write(send), self._seconds)
            except ClientGone:
                return
            except Exception as error:
                if not self._begun:
                    raise
                told = of_exception(error)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._send(send, event(told.body()), last=True), _LAST_WORD_S)
                if told.status == 500 and told is not error:  # a fault of ours: into the log
                    raise

    async def _write(self, send: Send) -> None:
        opened = set[Text]()
        async for batch in self._texts.events():
            chunks = [chunk for text, told in batch for chunk in self._chunks(text, told, opened)]
            await self._send(send, b"".join(map(event, chunks)))
        closing = self._answer.closing(self._texts.texts)
        await self._send(send, b"".join([*map(event, closing), b"data: [DONE]\n\n"]), last=True)

    def _chunks(self, text: Text, told: object, opened: set[Text]) -> Iterable[dict[str, Any]]:
        if text not in opened:
            opened.add(text)
            yield from self._answer.opening(text)
        if isinstance(told, Piece):
            yield from self._answer.chunk(text, told)
        elif isinstance(told, Finished):
            yield from self._answer.ending(text)

    async def _send(self, send: Send, body: bytes, *, last: bool = False) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if body or last:
            await send({"type": "http.response.body", "body": body, "more_body": not last})
