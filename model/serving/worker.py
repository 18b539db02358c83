"""The parent's side of the process that owns the model: starts it, starts it again, hands jobs in and events out.

What comes goes into each job's own queue, so that a slow reader stops neither the model nor the other jobs. A queue is
bounded by its text, which has `max_tokens`; who goes away is to `cancel`.
Knows no HTTP, and of the model only what `ModelInfo` tells.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from model.serving.jobs import Event, Failed, Finished, Job, ModelInfo, Started
from model.serving.life import Life
from model.serving.model_process import ModelOptions
from model.serving.protocol import Overloaded, WorkerError

log = logging.getLogger(__name__)
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0  # before a process is started again that died before it was ready
STUCK_S = 120.0  # without a word where there is work: the process is killed, as a grammar can hold llama.cpp for ever
USUAL_JOB_S = 5.0  # a job's time, before any was seen
DIED = "the model's process has died; it is being started again"


@dataclass
class _Running:
    """A job as the parent knows it."""

    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    since: float = field(default_factory=perf_counter)
    started: bool = False


class ModelWorker:
    """A `Worker` of `model/serving/protocol.py`. All methods are called from the event loop that `start` ran in.

    max_queue: jobs that may wait beside those that have a slot.
    """

    def __init__(self, options: ModelOptions, *, max_queue: int = 64) -> None:
        self._options, self._max_queue = options, max_queue
        self.info = ModelInfo(options.model_path.stem, "", 0, 0, "", options.slots, 0, False)  # until it is ready
        self.cached = 0
        self._jobs: dict[str, _Running] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._keys = 0
        self._life: Life | None = None
        self._closing = False
        self._changed = asyncio.Event()  # ready, refused, or a job is done
        self._refusal: str | None = None
        self._delay_s = FIRST_DELAY_S
        self._restart: asyncio.TimerHandle | None = None
        self._job_s = USUAL_JOB_S
        self._heard = 0.0  # when the process last said something, or got work after a rest

    def start(self) -> None:
        """Start the process; `ready` says when it has loaded the model."""
        self._loop = asyncio.get_running_loop()
        self._spawn()
        self._watch()

    async def wait_ready(self) -> None:
        """Wait until the model is loaded. Raises MedusaError where it cannot be."""
        while not self.ready:
            if self._refusal is not None:
                raise WorkerError(self._refusal)
            self._changed.clear()
            await self._changed.wait()

    @property
    def ready(self) -> bool:
        """See Worker."""
        return self._life is not None and self._life.ready and not self._closing

    @property
    def running(self) -> int:
        """Jobs whose prompt has been read."""
        return sum(job.started for job in self._jobs.values())

    @property
    def queue_length(self) -> int:
        """Jobs that wait, or whose prompt is being read."""
        return len(self._jobs) - self.running

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """See Worker."""
        assert job.id not in self._jobs, f"two jobs are called {job.id}"
        if not self.ready or len(self._jobs) >= self._options.slots + self._max_queue:
            raise Overloaded(max(1.0, self._job_s * (1 + self.queue_length) / self._options.slots))
        self._note_rest()
        running = self._jobs[job.id] = _Running()
        self._send("submit", job)
        return self._events(job.id, running)

    async def _events(self, id: str, running: _Running) -> AsyncIterator[Event]:
        try:
            while (event := await running.events.get()) is not None:
                yield event
                if isinstance(event, (Finished, Failed)):
                    return
        finally:
            if self._jobs.get(id) is running:
                self.cancel(id)

    def cancel(self, id: str) -> None:
        """See Worker."""
        running = self._jobs.pop(id, None)
        if running is not None:
            running.events.put_nowait(None)
            self._send("cancel", id)
            self._changed.set()

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """See Worker."""
        tokens: list[int] = await self._ask("tokenize", text, add_special, parse_special)
        return tokens

    async def detokenize(self, tokens: list[int]) -> str:
        """See Worker."""
        return str(await self._ask("detokenize", tokens))

    async def apply_template(self, messages: list[dict[str, Any]]) -> str:
        """See Worker."""
        return str(await self._ask("apply_template", messages))

    async def _ask(self, kind: str, *values: Any) -> Any:
        if not self.ready:
            raise WorkerError("the model is not ready")
        self._note_rest()
        self._keys += 1
        key, answer = self._keys, self._loop.create_future()
        self._answers[key] = answer
        try:
            self._send(kind, key, *values)
            return await answer
        finally:
            del self._answers[key]

    async def close(self, deadline_s: float) -> None:
        """See Worker."""
        self._closing, end = True, self._loop.time() + deadline_s
        if self._restart is not None:
            self._restart.cancel()
        while self._jobs and self._life is not None and (left := end - self._loop.time()) > 0:
            self._changed.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        self._fail_all("the server is shutting down")
        life, self._life = self._life, None
        if life is not None:
            await life.end()

    def _note_rest(self) -> None:
        if not (self._jobs or self._answers):  # it had nothing to say
            self._heard = self._loop.time()

    def _watch(self) -> None:
        """Now and then, kill a process that has work and gives no sign of life: its jobs fail, another one starts."""
        life, silent = self._life, self._loop.time() - self._heard
        if life is not None and life.ready and (self._jobs or self._answers) and silent > STUCK_S:
            log.error("the model's process has not said a word for %.0f s: it is killed", silent)
            life.process.kill()
        if not self._closing:
            self._loop.call_later(STUCK_S / 10, self._watch)

    def _send(self, *command: Any) -> None:
        if self._life is not None:
            self._life.send(*command)

    def _spawn(self) -> None:
        self._restart = None
        self._life = Life(self._options, self._loop, self._take, self._lost)

    def _take(self, life: Life, kind: str, *rest: Any) -> None:
        """Obey what a process says."""
        if life is not self._life:
            return
        self._heard = self._loop.time()
        if kind == "ready":
            self.info, life.ready, self._delay_s = rest[0], True, FIRST_DELAY_S
        elif kind == "refused":
            self._refusal = rest[0]
        elif kind == "answer":
            self._answer(*rest)
        else:
            events, self.cached = rest
            for event in events:
                self._deliver(event)
        if kind != "answer":
            self._changed.set()

    def _answer(self, key: int, value: Any) -> None:
        answer = self._answers.get(key)
        if answer is None or answer.done():
            return
        if isinstance(value, Exception):
            answer.set_exception(value)
        else:
            answer.set_result(value)

    def _deliver(self, event: Event) -> None:
        running = self._jobs.get(event.id)
        if running is None:  # cancelled meanwhile
            return
        running.events.put_nowait(event)
        if isinstance(event, Started):
            running.started = True
        elif isinstance(event, (Finished, Failed)):
            del self._jobs[event.id]
            self._job_s += 0.1 * (perf_counter() - running.since - self._job_s)

    def _lost(self, life: Life) -> None:
        """The process has ended, and nobody asked it to."""
        life.shut()
        if life is not self._life:
            return
        self._life, self.cached = None, 0
        self._fail_all(DIED)
        if self._closing or (self._refusal is not None and not self.info.context):
            return
        log.error("the model's process ended with code %s", life.process.exitcode)
        delay = 0.0 if life.ready else self._delay_s
        self._delay_s = FIRST_DELAY_S if life.ready else min(2 * self._delay_s, LONGEST_DELAY_S)
        self._restart = self._loop.call_later(delay, self._spawn)

    def _fail_all(self, why: str) -> None:
        for id in list(self._jobs):
            self._deliver(Failed(id, "internal", why))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerError(why))
        self._changed.set()
