"""What the web server asks of the process that owns the model. Knows nothing of HTTP and nothing of llama.cpp."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from model.errors import MedusaError
from model.serving.jobs import Event, Job, ModelInfo


class Overloaded(Exception):
    """The queue is full. retry_after_s: when it may be worth trying again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class WorkerError(MedusaError):
    """The model's process cannot answer: it loads, has died or closes; at the start: it cannot load the model."""


class Worker(Protocol):
    """Writes texts. All methods are called from one event loop; errors of users arrive as MedusaError."""

    @property
    def info(self) -> ModelInfo:
        """The model; asked for only after `ready` has been true once."""

    @property
    def ready(self) -> bool:
        """Whether jobs can be taken: False while the model loads, after a crash until it is back, while closing."""

    @property
    def cached(self) -> int:
        """Tokens in the cache, those of finished texts included; shared ones are counted for each text."""

    @property
    def queue_length(self) -> int:
        """Jobs that wait, or whose prompt is being read."""

    @property
    def running(self) -> int:
        """Jobs that are being written."""

    async def wait_ready(self) -> None:
        """Wait until the model is loaded. Raises MedusaError where it cannot be."""

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Queue a job and return its events; the last is a Finished or a Failed. Raises Overloaded."""

    def cancel(self, id: str) -> None:
        """Free the job's place within one step; an unknown or finished id is no error. Its events may just end."""

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the text's token ids."""

    async def detokenize(self, tokens: list[int]) -> str:
        """Return the text of token ids."""

    async def apply_template(self, messages: list[dict[str, Any]]) -> str:
        """Return a conversation as the model's template writes it, ready for the answer."""

    async def close(self, deadline_s: float) -> None:
        """Take no more jobs, finish what runs until the deadline, and leave no process behind. May be called again."""
