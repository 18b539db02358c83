"""What Prometheus is told: requests, tokens, times, acceptance. Each app has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.serving.jobs import Event, Failed, Finished, Piece, Started
from model.serving.protocol import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_PER_TOKEN = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_LENGTHS = (1.0, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12, 16)


class Metrics:
    """All counters of one server."""

    def __init__(self, worker: Worker) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("medusa_requests", "Answered HTTP requests", ["path", "status"], registry=r)
        self._texts = Counter("medusa_texts", "Texts by their end", ["outcome"], registry=r)
        self._prompt = Counter("medusa_prompt_tokens", "Tokens of prompts", registry=r)
        self._cached = Counter("medusa_prompt_tokens_cached", "Tokens of prompts that the cache held", registry=r)
        self._written = Counter("medusa_generated_tokens", "Tokens written", registry=r)
        self._steps = Counter("medusa_steps", "Verify passes, each counted once per text in it", registry=r)
        self._drafted = Counter("medusa_drafted_tokens", "Nodes drafted", registry=r)
        self._accepted = Counter("medusa_accepted_tokens", "Drafted tokens that were accepted", registry=r)
        self._depths = Counter("medusa_accepted_at_depth", "Accepted tokens by depth", ["depth"], registry=r)
        self._first = Histogram(
            "medusa_time_to_first_token_seconds", "From request to first text", buckets=_SECONDS, registry=r
        )
        self._each = Histogram(
            "medusa_time_per_output_token_seconds", "Per written token", buckets=_PER_TOKEN, registry=r
        )
        self._whole = Histogram("medusa_text_seconds", "From request to last text", buckets=_SECONDS, registry=r)
        self._length = Histogram("medusa_acceptance_length", "Tokens per step of a text", buckets=_LENGTHS, registry=r)
        for name, meaning, value in (
            ("medusa_queue_length", "Texts that wait for a slot", lambda: worker.queue_length),
            ("medusa_running", "Texts that have a slot", lambda: worker.running),
            ("medusa_slots", "Slots", lambda: worker.info.slots if worker.ready else 0),
            ("medusa_kv_cells", "Tokens that the cache holds", lambda: worker.info.cells if worker.ready else 0),
            ("medusa_kv_cells_used", "Tokens in the cache, finished texts' included", lambda: worker.cached),
            ("medusa_ready", "1 when the model takes requests", lambda: worker.ready),
        ):
            Gauge(name, meaning, registry=r).set_function(value)

    def saw(self, event: Event, seconds: float, first_piece: float | None) -> None:
        """Count an event. seconds since the request; first_piece: those until the text's first piece, if it came."""
        if isinstance(event, Started):
            self._prompt.inc(event.prompt_tokens)
            self._cached.inc(event.cached)
        elif isinstance(event, Piece):
            self.wrote(len(event.tokens))
        elif isinstance(event, Failed):
            self._texts.labels("refused" if event.kind == "bad_request" else "failed").inc()
        else:
            self._finished(event, seconds, first_piece)

    def _finished(self, event: Finished, seconds: float, first_piece: float | None) -> None:
        self._texts.labels(event.reason).inc()
        self._steps.inc(event.steps)
        self._drafted.inc(event.drafted)
        self._accepted.inc(event.accepted)
        for depth, accepted in enumerate(event.accepted_per_depth, 1):
            self._depths.labels(depth).inc(accepted)
        self._whole.observe(seconds)
        if first_piece is not None:
            self._first.observe(first_piece)
        if event.new_tokens:
            self._each.observe(event.predicted_s / event.new_tokens)
        if event.steps:
            self._length.observe(event.new_tokens / event.steps)

    def wrote(self, tokens: int) -> None:
        """Count new tokens."""
        self._written.inc(tokens)

    def cancelled(self) -> None:
        """Count a text that ended early: its client left, its time was up, or another text of its request failed."""
        self._texts.labels("cancelled").inc()

    def page(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


class CountRequests:
    """Middleware: counts responses by route and status; what is no route counts as "other"."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

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
            self._metrics.requests.labels(getattr(scope.get("route"), "path", "other"), status).inc()

        try:
            await self._app(scope, receive, counted)
        except Exception:  # answered further out
            count(500)
            raise
