"""The texts of one request on their way through the worker: submitted together, events merged, leftovers cancelled.

Knows no HTTP beyond ASGI's way to say that the client has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, TypeVar

from typing_extensions import Self

from model.serving.errors import ApiError, ClientGone, not_ready, of_failure
from model.serving.jobs import Event, Failed, Finished, Job, Piece, Started
from model.serving.metrics import Metrics
from model.serving.protocol import Worker

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
ResultT = TypeVar("ResultT")


@dataclass(eq=False)
class Text:
    """One choice of an answer while it is written."""

    job: Job
    index: int
    since: float = field(default_factory=perf_counter)
    started: Started | None = None
    first_piece: float | None = None  # seconds from the request to the first piece
    new_tokens: int = 0
    free_tokens: int = 0  # of the new ones, those that a draft won
    offset: int = 0  # characters whose tokens have been told of: OpenAI's text_offset
    finished: Finished | None = None
    failed: Failed | None = None

    @property
    def cached(self) -> int:
        """How many of the prompt's tokens the cache held."""
        return self.started.cached if self.started else 0

    @property
    def done(self) -> bool:
        """Whether the worker has no more to do for it."""
        return self.finished is not None or self.failed is not None


class Texts:
    """The texts of one request. As a context manager: submits them; at the end cancels what is unfinished.

    running: the server's list of all texts under way, in which these stand meanwhile.
    """

    def __init__(self, worker: Worker, jobs: list[Job], metrics: Metrics, running: dict[str, Text]) -> None:
        self._worker, self._metrics, self._running = worker, metrics, running
        self.texts = [Text(job, index) for index, job in enumerate(jobs)]
        self._queue: asyncio.Queue[tuple[Text, Event | Exception]] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self._submitted: list[Text] = []

    async def __aenter__(self) -> Self:
        if not self._worker.ready:
            raise not_ready()
        try:
            for text in self.texts:
                stream = self._worker.submit(text.job)
                self._submitted.append(text)
                self._running[text.job.id] = text
                self._pumps.append(asyncio.create_task(self._pump(text, stream)))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for text in self._submitted:
            del self._running[text.job.id]
            if not text.done:
                self._worker.cancel(text.job.id)
                self._metrics.cancelled()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, text: Text, stream: AsyncIterator[Event]) -> None:
        try:
            async for event in stream:
                self._note(text, event)
                self._queue.put_nowait((text, event))
                if text.done:
                    return
            text.failed = Failed(text.job.id, "internal", "the text broke off")
            self._queue.put_nowait((text, text.failed))
        except Exception as error:  # told to whoever waits for events
            self._queue.put_nowait((text, error))

    def _note(self, text: Text, event: Event) -> None:
        if isinstance(event, Started):
            text.started = event
        elif isinstance(event, Piece):
            if text.job.echo:  # prompt or new? Counted at the end
                return
            text.new_tokens += len(event.tokens)
            text.free_tokens += sum(token.drafted for token in event.tokens)
            text.first_piece = text.first_piece or perf_counter() - text.since
        elif isinstance(event, Finished):
            text.finished = event
            if text.job.echo:
                self._metrics.wrote(event.new_tokens)
        else:
            text.failed = event
        self._metrics.saw(event, perf_counter() - text.since, text.first_piece)

    async def events(self) -> AsyncIterator[list[tuple[Text, Event]]]:
        """Yield what has come since the last time, until all texts are finished. Raises ApiError where one fails."""
        open_texts = len(self.texts)
        while open_texts:
            waiting = [await self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            ready: list[tuple[Text, Event]] = []
            for text, event in waiting:
                if isinstance(event, Failed | Exception):
                    if ready:
                        yield ready
                    raise of_failure(event) if isinstance(event, Failed) else event
                open_texts -= isinstance(event, Finished)
                ready.append((text, event))
            yield ready


async def while_connected(receive: Receive, work: Coroutine[Any, Any, ResultT], seconds: float) -> ResultT:
    """Return what work returns; stop it when the client leaves (raises ClientGone) or the time is up (ApiError 504).

    receive: ASGI's, with the request's body already read.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise ClientGone
        # OpenAI's client would send it all again
        headers = {"x-should-retry": "false"}
        raise ApiError(504, f"not finished after {seconds:g} s (REQUEST_TIMEOUT)", code="timeout", headers=headers)
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
