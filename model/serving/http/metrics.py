"""Metrics for Prometheus: requests, tokens, seconds, acceptance.

Each application has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.serving.http.running_request import Choice
from model.serving.worker.messages import Event, Failed, Finished, Started, TextChunk
from model.serving.worker.protocol import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_SECONDS_PER_TOKEN = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_LENGTHS = (1.0, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12, 16)


class Metrics:
    """All metrics of one server. medusa_texts and medusa_text_seconds are older names."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self._worker = worker
        self.requests = self._counter("medusa_requests", "Answered HTTP requests", "path", "status")
        self._sequences = [
            self._counter("medusa_sequences", "Sequences by how they ended", "outcome"),
            self._counter("medusa_texts", "Deprecated alias of medusa_sequences", "outcome"),
        ]
        self._prompt = self._counter("medusa_prompt_tokens", "Prompt tokens")
        self._cached = self._counter(
            "medusa_prompt_tokens_cached", "Prompt tokens that the prefix cache held"
        )
        self._generated = self._counter("medusa_generated_tokens", "Generated tokens")
        self._steps = self._counter(
            "medusa_steps", "Verify passes, each counted once per sequence in it"
        )
        self._drafted = self._counter("medusa_drafted_tokens", "Draft tokens")
        self._accepted = self._counter("medusa_accepted_tokens", "Accepted draft tokens")
        self._accepted_at_depth = self._counter(
            "medusa_accepted_at_depth", "Accepted draft tokens by depth", "depth"
        )
        self._drafted_by_source = self._counter(
            "medusa_drafted_tokens_by_source", "Draft tokens by draft source", "source"
        )
        self._accepted_by_source = self._counter(
            "medusa_accepted_tokens_by_source", "Accepted draft tokens by draft source", "source"
        )
        self._first_token_s = self._histogram(
            "medusa_time_to_first_token_seconds", "From request to first text", _SECONDS
        )
        self._token_s = self._histogram(
            "medusa_time_per_output_token_seconds",
            "Decoding seconds per generated token",
            _SECONDS_PER_TOKEN,
        )
        self._sequence_s = [
            self._histogram("medusa_sequence_seconds", "From request to last text", _SECONDS),
            self._histogram(
                "medusa_text_seconds", "Deprecated alias of medusa_sequence_seconds", _SECONDS
            ),
        ]
        self._acceptance_length = self._histogram(
            "medusa_acceptance_length", "Tokens per step of a sequence", _LENGTHS
        )
        self._add_gauges()

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, meaning, buckets=buckets, registry=self.registry)

    def _add_gauges(self) -> None:
        """Add what the worker is asked for whenever the metrics are read."""
        worker = self._worker
        for name, meaning, value in (
            (
                "medusa_queue_length",
                "Sequences that wait or are prefilled",
                lambda: worker.queue_length,
            ),
            ("medusa_running", "Sequences that are decoded", lambda: worker.running),
            (
                "medusa_slots",
                "Sequences that can run at the same time",
                lambda: worker.info.slots if worker.ready else 0,
            ),
            (
                "medusa_kv_cells",
                "Tokens that the KV cache can hold",
                lambda: worker.info.cells if worker.ready else 0,
            ),
            (
                "medusa_kv_cells_used",
                "Tokens in the KV cache, the prefix cache included",
                lambda: worker.cells_used,
            ),
            ("medusa_ready", "1 when the model takes requests", lambda: worker.ready),
            (
                "medusa_measuring",
                "1 while nothing drafts, as what drafts cost and bring is still being measured",
                lambda: worker.ready and worker.info.measuring,
            ),
        ):
            Gauge(name, meaning, registry=self.registry).set_function(value)

    def count(self, event: Event, choice: Choice) -> None:
        """Count an event of a choice that has taken note of it."""
        if isinstance(event, Started):
            self._prompt.inc(event.prompt_tokens)
            self._cached.inc(event.cached_tokens)
        elif isinstance(event, TextChunk):
            if not choice.request.echo:  # prompt or new? counted in the end
                self._generated.inc(len(event.tokens))
        elif isinstance(event, Failed):
            self._count_outcome("refused" if event.kind == "bad_request" else "failed")
        else:
            self._count_finished(event, choice)

    def count_cancelled(self) -> None:
        """Count a sequence that was cancelled.

        Its client left, its time was up, or another choice of its request failed.
        """
        self._count_outcome("cancelled")

    def _count_outcome(self, outcome: str) -> None:
        for counter in self._sequences:
            counter.labels(outcome).inc()

    def _count_finished(self, event: Finished, choice: Choice) -> None:
        self._count_outcome(event.reason)
        if choice.request.echo:
            self._generated.inc(event.new_tokens)

        # drafts
        self._steps.inc(event.steps)
        self._drafted.inc(event.drafted)
        self._accepted.inc(event.accepted)
        for depth, accepted in enumerate(event.accepted_per_depth, 1):
            self._accepted_at_depth.labels(depth).inc(accepted)
        for source, drafted in event.drafted_by_source.items():
            self._drafted_by_source.labels(source).inc(drafted)
        for source, accepted in event.accepted_by_source.items():
            self._accepted_by_source.labels(source).inc(accepted)
        if event.steps:
            self._acceptance_length.observe(event.new_tokens / event.steps)

        # seconds
        for histogram in self._sequence_s:
            histogram.observe(perf_counter() - choice.since)
        if choice.first_chunk_s is not None:
            self._first_token_s.observe(choice.first_chunk_s)
        if event.new_tokens:
            self._token_s.observe(event.predicted_s / event.new_tokens)

    def page(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


class CountRequests:
    """Middleware: counts responses by route and status; what is no route counts as "other"."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[Route]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = {route.endpoint: route.path for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        def count(status: int) -> None:
            endpoint: Any = scope.get("endpoint")  # named by the routing
            path = self._paths.get(endpoint, "other")
            self._metrics.requests.labels(path, status).inc()

        try:
            await self._app(scope, receive, counted)
        except Exception:  # answered further out
            count(500)
            raise
