"""The `Worker` protocol: what the web server asks of the side that owns the model.

Knows nothing of HTTP and nothing of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from model.errors import MedusaError
from model.serving.worker.messages import Event, ModelInfo, SequenceRequest

Deliver = Callable[[Event], None]


class Overloaded(Exception):
    """The queue is full. retry_after_s: when it may be worth trying again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class WorkerError(MedusaError):
    """The model's process cannot answer: it loads, has died or closes.

    At the start: it cannot load the model.
    """


class Worker(Protocol):
    """Generates sequences. All methods are called from one event loop.

    Errors of users arrive as MedusaError.
    """

    @property
    def info(self) -> ModelInfo:
        """The model; asked for only after `ready` has been true once."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken.

        False while the model loads, after a crash until it is loaded again, and while closing.
        """

    @property
    def cells_used(self) -> int:
        """Tokens in the KV cache, prefix cache included; shared ones count for each sequence."""

    @property
    def queue_length(self) -> int:
        """Sequences that wait, or whose prompt is being prefilled."""

    @property
    def running(self) -> int:
        """Sequences that are being decoded."""

    async def wait_ready(self) -> None:
        """Wait until the model is loaded. Raises MedusaError where it cannot be."""

    def submit(self, request: SequenceRequest, deliver: Deliver) -> None:
        """Queue a sequence and pass its events to `deliver`, in the event loop, as they come.

        The last one is a Finished or a Failed. Raises Overloaded where there is no room.
        """

    def cancel(self, id: str) -> None:
        """End a sequence within one step and deliver nothing more of it.

        An unknown or finished id is no error.
        """

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the text's token ids."""

    async def detokenize(self, tokens: list[int]) -> str:
        """Return the text of token ids."""

    async def apply_template(self, messages: list[dict[str, Any]]) -> str:
        """Return a conversation as the model's chat template writes it, ready for the answer."""

    async def close(self, deadline_s: float) -> None:
        """Take no more requests, finish what runs until the deadline, leave no process behind.

        May be called again.
        """
