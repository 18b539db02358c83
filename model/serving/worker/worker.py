"""The worker: the parent's side of the process that owns the model.

It starts the process and restarts it after a crash, hands requests in and delivers their events.
Knows no HTTP, and of the model only what `ModelInfo` tells.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from model.serving.worker.messages import (
    Event,
    Failed,
    Finished,
    ModelInfo,
    SequenceRequest,
    Started,
)
from model.serving.worker.process_handle import ProcessHandle
from model.serving.worker.protocol import Deliver, Overloaded, WorkerError
from model.serving.worker.served_model import ModelOptions

log = logging.getLogger(__name__)
RESTART_DELAY_S = 0.5  # before a process is started again that ended before it was ready; doubles
MAX_RESTART_DELAY_S = 30.0
# A process that has work and sends nothing for so long is killed: a grammar can hold llama.cpp
# for ever.
STUCK_S = 120.0
INITIAL_SEQUENCE_S = 5.0  # what a sequence is expected to take before any was seen
SEQUENCE_S_WEIGHT = 0.1  # of the newest sequence in the running mean of their seconds
DIED = "the model's process has died; it is being started again"


@dataclass
class _Submitted:
    """Where a sequence's events go, and when it came. started: its prompt has been prefilled."""

    deliver: Deliver
    since: float = field(default_factory=perf_counter)
    started: bool = False


class ModelWorker:
    """A `Worker` around a process of its own. All methods are called from the loop of `start`.

    max_queue: sequences that may wait beside those that run.
    """

    def __init__(self, options: ModelOptions, *, max_queue: int = 64) -> None:
        self._options = options
        self._max_queue = max_queue
        self.info = ModelInfo(  # until the process tells
            name=options.model_path.stem,
            file_type="",
            context=0,
            vocabulary=0,
            draft="",
            slots=options.slots,
            cells=0,
            has_chat_template=False,
        )
        self.cells_used = 0
        self._sequences: dict[str, _Submitted] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}  # to questions, by their number
        self._n_questions = 0
        self._handle: ProcessHandle | None = None
        self._closing = False
        self._changed = asyncio.Event()  # ready, refused, or a sequence is done
        self._refusal: str | None = None  # why the model cannot be loaded
        self._restart_delay_s = RESTART_DELAY_S
        self._restart: asyncio.TimerHandle | None = None
        self._mean_sequence_s = INITIAL_SEQUENCE_S
        self._last_message = 0.0  # when the process last sent something, or got work after a rest

    def start(self) -> None:
        """Start the process; `ready` says when it has loaded the model."""
        self._loop = asyncio.get_running_loop()
        self._spawn()
        self._watch()

    async def wait_ready(self) -> None:
        """See Worker."""
        while not self.ready:
            if self._refusal is not None:
                raise WorkerError(self._refusal)
            self._changed.clear()
            await self._changed.wait()

    @property
    def ready(self) -> bool:
        """See Worker."""
        return self._handle is not None and self._handle.ready and not self._closing

    @property
    def running(self) -> int:
        """See Worker."""
        return sum(sequence.started for sequence in self._sequences.values())

    @property
    def queue_length(self) -> int:
        """See Worker."""
        return len(self._sequences) - self.running

    def submit(self, request: SequenceRequest, deliver: Deliver) -> None:
        """See Worker."""
        assert request.id not in self._sequences, f"two sequences are called {request.id}"
        room = self._options.slots + self._max_queue - len(self._sequences)
        if not self.ready or room <= 0:
            raise Overloaded(self._expected_wait_s())
        self._note_rest()
        self._sequences[request.id] = _Submitted(deliver)
        self._send("submit", request)

    def _expected_wait_s(self) -> float:
        ahead = 1 + self.queue_length
        return max(1.0, self._mean_sequence_s * ahead / self._options.slots)

    def cancel(self, id: str) -> None:
        """See Worker."""
        if self._sequences.pop(id, None) is not None:
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

    async def _ask(self, question: str, *values: Any) -> Any:
        if not self.ready:
            raise WorkerError("the model is not ready")
        self._note_rest()
        self._n_questions += 1
        number = self._n_questions
        answer = self._answers[number] = self._loop.create_future()
        try:
            self._send(question, number, *values)
            return await answer
        finally:
            del self._answers[number]

    async def close(self, deadline_s: float) -> None:
        """See Worker."""
        self._closing = True
        end = self._loop.time() + deadline_s
        if self._restart is not None:
            self._restart.cancel()
        while self._sequences and self._handle is not None:
            left_s = end - self._loop.time()
            if left_s <= 0:
                break
            self._changed.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)
        self._fail_all("the server is shutting down")
        handle = self._handle
        self._handle = None
        if handle is not None:
            await handle.end()

    # the process

    def _spawn(self) -> None:
        self._restart = None
        self._handle = ProcessHandle(
            self._options,
            loop=self._loop,
            on_message=self._on_message,
            on_exit=self._on_exit,
        )

    def _send(self, *command: Any) -> None:
        if self._handle is not None:
            self._handle.send(*command)

    @property
    def _has_work(self) -> bool:
        return bool(self._sequences or self._answers)

    def _note_rest(self) -> None:
        """Before new work: a process that had none had nothing to send."""
        if not self._has_work:
            self._last_message = self._loop.time()

    def _watch(self) -> None:
        """Now and then, kill a process that has work and sends nothing; another one is started."""
        handle = self._handle
        silent_s = self._loop.time() - self._last_message
        if handle is not None and handle.ready and self._has_work and silent_s > STUCK_S:
            log.error("the model's process has sent nothing for %.0f s: it is killed", silent_s)
            handle.process.kill()
        if not self._closing:
            self._loop.call_later(STUCK_S / 10, self._watch)

    def _on_message(self, handle: ProcessHandle, kind: str, *rest: Any) -> None:
        """Take what a process sends."""
        if handle is not self._handle:
            return
        self._last_message = self._loop.time()
        if kind == "answer":
            self._resolve(*rest)
            return
        if kind == "ready":
            (self.info,) = rest
            handle.ready = True
            self._restart_delay_s = RESTART_DELAY_S
        elif kind == "info":
            (self.info,) = rest
            self.cells_used = 0  # its KV cache is a new one
        elif kind == "refused":
            (self._refusal,) = rest
        else:
            assert kind == "events", kind
            events, self.cells_used = rest
            for event in events:
                self._deliver(event)
        self._changed.set()

    def _on_exit(self, handle: ProcessHandle) -> None:
        """Clean up after a process that has ended, and start another one unless it was to end."""
        handle.close_pipes()
        if handle is not self._handle:
            return
        self._handle = None
        self.cells_used = 0
        self._fail_all(DIED)
        never_loaded = not self.info.context
        if self._closing or (self._refusal is not None and never_loaded):
            return
        log.error("the model's process ended with code %s", handle.process.exitcode)
        delay_s = 0.0
        if handle.ready:
            self._restart_delay_s = RESTART_DELAY_S
        else:
            delay_s = self._restart_delay_s
            self._restart_delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)
        self._restart = self._loop.call_later(delay_s, self._spawn)

    # what comes of requests

    def _resolve(self, number: int, value: Any) -> None:
        """Give the answer to whoever asked; an exception is raised there."""
        answer = self._answers.get(number)
        if answer is None or answer.done():
            return
        if isinstance(value, Exception):
            answer.set_exception(value)
        else:
            answer.set_result(value)

    def _deliver(self, event: Event) -> None:
        sequence = self._sequences.get(event.id)
        if sequence is None:  # cancelled meanwhile
            return
        if isinstance(event, Started):
            sequence.started = True
        elif isinstance(event, Finished | Failed):
            del self._sequences[event.id]
            seconds = perf_counter() - sequence.since
            self._mean_sequence_s += SEQUENCE_S_WEIGHT * (seconds - self._mean_sequence_s)
        sequence.deliver(event)

    def _fail_all(self, why: str) -> None:
        for id in list(self._sequences):
            self._deliver(Failed(id, "internal", why))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerError(why))
        self._changed.set()
