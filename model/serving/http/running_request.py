"""A running request: a client's choices, their progress, and the one queue of their events.

Knows neither HTTP nor who generates the choices.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from model.serving.http.errors import of_failure
from model.serving.worker.messages import (
    Event,
    Failed,
    Finished,
    SequenceRequest,
    Started,
    TextChunk,
)


@dataclass(eq=False, kw_only=True)
class Choice:
    """One of a request's answers, and how far it is.

    since: when the request came, by perf_counter. first_chunk_s: seconds from then to the first
    text. new_tokens, accepted_tokens: so far; the accepted ones are draft tokens. With `echo` they
    are not counted, as chunks don't say where the prompt ends.
    text_offset: characters whose tokens have been sent, for OpenAI's field of that name.
    """

    request: SequenceRequest
    index: int
    since: float = field(default_factory=perf_counter)
    started: Started | None = None
    first_chunk_s: float | None = None
    new_tokens: int = 0
    accepted_tokens: int = 0
    text_offset: int = 0
    finished: Finished | None = None
    failed: Failed | None = None

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens the prefix cache held."""
        return self.started.cached_tokens if self.started else 0

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finished is not None or self.failed is not None

    def note(self, event: Event) -> None:
        """Take note of an event of this choice."""
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, TextChunk):
            if not self.request.echo:
                self._count(event)
        elif isinstance(event, Finished):
            self.finished = event
        else:
            self.failed = event

    def _count(self, chunk: TextChunk) -> None:
        self.new_tokens += len(chunk.tokens)
        self.accepted_tokens += sum(token.drafted for token in chunk.tokens)
        if self.first_chunk_s is None:
            self.first_chunk_s = perf_counter() - self.since


class RunningRequest:
    """A client's request while it runs.

    choices: those of the first prompt, those of the second …; n: choices of each prompt.
    Whoever generates the choices passes their events to `deliver`; one reader awaits `events`.
    A slow reader stops nobody: the queue is bounded by the text, which has `max_tokens`.
    """

    def __init__(self, id: str, sequences: Sequence[SequenceRequest], n: int = 1) -> None:
        self.id = id
        self.n = n
        self.choices = [
            Choice(request=sequence, index=index) for index, sequence in enumerate(sequences)
        ]
        self._by_id = {choice.request.id: choice for choice in self.choices}
        self._queue: asyncio.Queue[tuple[Choice, Event]] = asyncio.Queue()

    def deliver(self, event: Event) -> Choice:
        """Take the next event; return the choice that it belongs to."""
        choice = self._by_id[event.id]
        choice.note(event)
        self._queue.put_nowait((choice, event))
        return choice

    async def events(self) -> AsyncIterator[list[tuple[Choice, Event]]]:
        """Yield what has come since the last time, until all choices are finished.

        Raises ApiError where one fails.
        """
        unfinished = len(self.choices)
        while unfinished:
            arrived = [await self._queue.get()]
            while not self._queue.empty():
                arrived.append(self._queue.get_nowait())
            batch = list[tuple[Choice, Event]]()
            for choice, event in arrived:
                if isinstance(event, Failed):
                    if batch:
                        yield batch
                    raise of_failure(event)
                if isinstance(event, Finished):
                    unfinished -= 1
                batch.append((choice, event))
            yield batch

    async def collect(self) -> list[list[TextChunk]]:
        """Return each choice's chunks once all are finished. Raises ApiError where one fails."""
        chunks: list[list[TextChunk]] = [[] for _ in self.choices]
        async for batch in self.events():
            for choice, event in batch:
                if isinstance(event, TextChunk):
                    chunks[choice.index].append(event)
        return chunks
