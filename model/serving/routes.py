"""What answers: OpenAI's completions and chats, llama.cpp's small helpers, health, metrics and the page."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import FileResponse, Response

from model.serving.answers import Answer, ChatAnswer, CompletionAnswer
from model.serving.errors import ApiError, json_response, not_ready, shown
from model.serving.fields import RequestT, parse
from model.serving.jobs import ModelInfo, Piece
from model.serving.metrics import Metrics
from model.serving.protocol import Worker
from model.serving.schemas import (
    MOST_TEXTS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TemplateRequest,
    TextRequest,
    TokenizeRequest,
)
from model.serving.streaming import EventStream
from model.serving.texts import Text, Texts, while_connected

WEB = Path(__file__).with_name("web")
PAGE = {"/": "index.html", "/style.css": "style.css", "/app.js": "app.js"}
OPEN_PATHS = (*PAGE, "/health")  # need no key
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Service:
    """What all routes share."""

    worker: Worker
    metrics: Metrics
    max_queue: int
    request_timeout_s: float
    running: dict[str, Text] = field(default_factory=dict)
    since: int = field(default_factory=lambda: int(time.time()))

    def info(self) -> ModelInfo:
        """Return what is known of the model. Raises ApiError while it loads."""
        if not self.worker.ready:
            raise not_ready()
        return self.worker.info

    async def write(self, http: Request, request: TextRequest, answer: type[Answer], *, logprobs: bool) -> Response:
        """Answer a request for texts, streaming or at once."""
        info, id = self.info(), answer.prefix + uuid4().hex
        jobs = request.jobs(id, info, min(MOST_TEXTS, info.slots + self.max_queue))
        texts = Texts(self.worker, jobs, self.metrics, self.running)
        told = answer(id, info.name, request, logprobs=logprobs)
        if request.stream:
            return EventStream(texts, told, self.request_timeout_s)
        async with texts:
            pieces = await while_connected(http.receive, _pieces(texts), self.request_timeout_s)
        return json_response(told.whole(texts.texts, pieces))


async def _pieces(texts: Texts) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in texts.texts]
    async for batch in texts.events():
        for text, event in batch:
            if isinstance(event, Piece):
                pieces[text.index].append(event)
    return pieces


async def _read(http: Request, kind: type[RequestT]) -> RequestT:
    return parse(kind, await http.body())


def router(service: Service) -> APIRouter:
    """Return all routes."""
    routes = APIRouter()
    add_openai(routes, service)
    add_helpers(routes, service)
    for path, file in PAGE.items():
        routes.add_api_route(path, _page(file), methods=["GET", "HEAD"])
    return routes


def _page(file: str) -> Any:
    async def page() -> Response:
        return FileResponse(WEB / file, headers=_PAGE_HEADERS)

    return page


def add_openai(routes: APIRouter, service: Service) -> None:
    """Add what OpenAI's clients ask for."""

    @routes.post("/v1/completions")
    async def completions(http: Request) -> Response:
        request = await _read(http, CompletionRequest)
        return await service.write(http, request, CompletionAnswer, logprobs=request.logprobs is not None)

    @routes.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        request = await _read(http, ChatRequest)
        return await service.write(http, request, ChatAnswer, logprobs=request.logprobs)

    @routes.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(service)]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.info().name:
            raise ApiError(404, f"there is no model {shown(name)}", param="model", code="model_not_found")
        return json_response(_model(service))


def _model(service: Service) -> dict[str, Any]:
    info = service.info()
    meta = {"file_type": info.file_type, "n_ctx": info.context, "n_vocab": info.vocabulary}
    return {"id": info.name, "object": "model", "created": service.since, "owned_by": "medusa-gguf", "meta": meta}


def add_helpers(routes: APIRouter, service: Service) -> None:
    """Add what llama.cpp's server offers besides, in its form, and what monitoring asks for."""
    worker = service.worker

    @routes.get("/health")
    async def health() -> Response:
        if worker.ready:
            return json_response({"status": "ok"})
        return json_response({"status": "loading", **not_ready().body()}, 503, {"Retry-After": "5"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @routes.get("/props")
    async def props() -> Response:
        info = service.info()
        return json_response(
            {
                "model": info.name,
                "file_type": info.file_type,
                "n_ctx": info.context,
                "n_vocab": info.vocabulary,
                "total_slots": info.slots,
                "max_queue": service.max_queue,
                "draft": info.draft,
                "chat_template": info.chat,
            }
        )

    @routes.get("/slots")
    async def slots() -> Response:
        running = [text for text in service.running.values() if text.started and not text.done]
        empty: list[Text | None] = [None] * max(0, service.info().slots - len(running))
        return json_response([_slot(i, text) for i, text in enumerate([*running, *empty])])

    @routes.post("/tokenize")
    async def tokenize(http: Request) -> Response:
        request = await _read(http, TokenizeRequest)
        service.info()
        tokens = await worker.tokenize(
            request.content, add_special=request.add_special, parse_special=request.parse_special
        )
        return json_response({"tokens": tokens})

    @routes.post("/detokenize")
    async def detokenize(http: Request) -> Response:
        tokens = (await _read(http, DetokenizeRequest)).tokens
        vocabulary = service.info().vocabulary
        if wrong := [t for t in tokens if t >= vocabulary]:
            raise ApiError(
                400, f"tokens: there is no token {wrong[0]}; the vocabulary has {vocabulary}", param="tokens"
            )
        return json_response({"content": await worker.detokenize(tokens)})

    @routes.post("/apply-template")
    async def apply_template(http: Request) -> Response:
        messages = (await _read(http, TemplateRequest)).messages
        service.info()
        return json_response({"prompt": await worker.apply_template([message.plain() for message in messages])})


def _slot(id: int, text: Text | None) -> dict[str, Any]:
    """Return what one place does. Not which: the worker keeps that to itself. Nobody's text is shown."""
    if text is None or text.started is None:
        return {"id": id, "is_processing": False}
    seconds = time.perf_counter() - text.since
    return {
        "id": id,
        "is_processing": True,
        "id_task": text.job.id,
        "draft": text.job.draft,
        "n_prompt_tokens": text.started.prompt_tokens,
        "n_prompt_tokens_cached": text.cached,
        "n_decoded": text.new_tokens,
        "n_accepted": text.free_tokens,
        "n_remain": None if text.job.max_tokens is None else text.job.max_tokens - text.new_tokens,
        "temperature": text.job.sampling.temperature,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(text.new_tokens / seconds, 2),
    }
