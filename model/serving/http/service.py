"""The service behind the routes: submits requests to the worker, answers them streamed or whole.

Knows no paths.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from model.serving.http.answers import Answer
from model.serving.http.connections import while_connected
from model.serving.http.errors import json_response, not_ready
from model.serving.http.metrics import Metrics
from model.serving.http.running_request import Choice, RunningRequest
from model.serving.http.schemas import MAX_CHOICES, GenerationRequest
from model.serving.http.streaming import EventStream
from model.serving.worker.messages import Event, ModelInfo
from model.serving.worker.protocol import Worker


@dataclass(kw_only=True)
class Service:
    """What all routes share. since: seconds of the Unix epoch at which the server started."""

    worker: Worker
    metrics: Metrics
    max_queue: int
    request_timeout_s: float
    running: dict[str, RunningRequest] = field(default_factory=dict)
    since: int = field(default_factory=lambda: int(time.time()))

    def info(self) -> ModelInfo:
        """Return what is known of the model. Raises ApiError while it loads."""
        if not self.worker.ready:
            raise not_ready()
        return self.worker.info

    def running_choices(self) -> list[Choice]:
        """Return the choices that are being decoded."""
        choices = [choice for request in self.running.values() for choice in request.choices]
        return [choice for choice in choices if choice.started and not choice.done]

    async def generate(
        self, http: Request, request: GenerationRequest, answer_type: type[Answer]
    ) -> Response:
        """Answer a request for completions."""
        info = self.info()
        most = min(MAX_CHOICES, info.slots + self.max_queue)
        running = request.running(answer_type.prefix + uuid4().hex, info, most)
        answer = answer_type(running, request, info.name)
        timeout_s = self.request_timeout_s
        if request.stream:
            return EventStream(running, answer, self.submitted(running), timeout_s)
        with self.submitted(running):
            chunks = await while_connected(http.receive, running.collect(), timeout_s)
        return json_response(answer.whole(chunks))

    @contextmanager
    def submitted(self, request: RunningRequest) -> Iterator[None]:
        """Submit all choices of a request; in the end, cancel those that are unfinished.

        Raises ApiError where the model is not ready, Overloaded where the queue is full.
        """
        self.info()

        def deliver(event: Event) -> None:
            choice = request.deliver(event)
            self.metrics.count(event, choice)

        submitted = list[Choice]()
        self.running[request.id] = request
        try:
            for choice in request.choices:
                self.worker.submit(choice.request, deliver)
                submitted.append(choice)
            yield
        finally:
            del self.running[request.id]
            for choice in submitted:
                if not choice.done:
                    self.worker.cancel(choice.request.id)
                    self.metrics.count_cancelled()
