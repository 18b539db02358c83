"""The routes: OpenAI's completions and chats, llama.cpp's helpers, health, metrics and the page."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from model.serving.http.answers import ChatAnswer, CompletionAnswer
from model.serving.http.errors import ApiError, json_response, not_ready, shown
from model.serving.http.fields import RequestT, parse
from model.serving.http.running_request import Choice
from model.serving.http.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TemplateRequest,
    TokenizeRequest,
)
from model.serving.http.service import Service

WEB = Path(__file__).with_name("web")
PAGE = {"/": "index.html", "/style.css": "style.css", "/app.js": "app.js"}
OPEN_PATHS = (*PAGE, "/health")  # need no key
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _service(http: Request) -> Service:
    service = http.app.state.service
    assert isinstance(service, Service)
    return service


async def _read(http: Request, kind: type[RequestT]) -> RequestT:
    return parse(kind, await http.body())


# OpenAI's


async def completions(http: Request) -> Response:
    """POST /v1/completions."""
    request = await _read(http, CompletionRequest)
    return await _service(http).generate(http, request, CompletionAnswer)


async def chat_completions(http: Request) -> Response:
    """POST /v1/chat/completions."""
    request = await _read(http, ChatRequest)
    return await _service(http).generate(http, request, ChatAnswer)


async def models(http: Request) -> Response:
    """GET /v1/models."""
    return json_response({"object": "list", "data": [_model(_service(http))]})


async def model(http: Request) -> Response:
    """GET /v1/models/NAME."""
    service = _service(http)
    name = http.path_params["name"]
    if name != service.info().name:
        message = f"there is no model {shown(name)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return json_response(_model(service))


def _model(service: Service) -> dict[str, Any]:
    info = service.info()
    return {
        "id": info.name,
        "object": "model",
        "created": service.since,
        "owned_by": "medusa-gguf",
        "meta": {
            "file_type": info.file_type,
            "n_ctx": info.context,
            "n_vocab": info.vocabulary,
        },
    }


# llama.cpp's


async def props(http: Request) -> Response:
    """GET /props."""
    service = _service(http)
    info = service.info()
    return json_response(
        {
            "model": info.name,
            "file_type": info.file_type,
            "n_ctx": info.context,
            "n_vocab": info.vocabulary,
            "total_slots": info.slots,
            "max_queue": service.max_queue,
            "kv_cells": info.cells,
            "draft": info.draft,
            "measuring": info.measuring,
            "chat_template": info.has_chat_template,
        }
    )


async def slots(http: Request) -> Response:
    """GET /slots: what runs. Nobody's text is shown."""
    service = _service(http)
    running = [_slot(id, choice) for id, choice in enumerate(service.running_choices())]
    idle = range(len(running), service.info().slots)
    return json_response([*running, *({"id": id, "is_processing": False} for id in idle)])


def _slot(id: int, choice: Choice) -> dict[str, Any]:
    """Return what one KV slot does. The id is not the worker's, which keeps its own to itself."""
    assert choice.started is not None
    request = choice.request
    seconds = time.perf_counter() - choice.since
    remaining = None
    if request.max_tokens is not None:
        remaining = request.max_tokens - choice.new_tokens
    return {
        "id": id,
        "is_processing": True,
        "id_task": request.id,
        "draft": request.draft,
        "n_prompt_tokens": choice.started.prompt_tokens,
        "n_prompt_tokens_cached": choice.cached_tokens,
        "n_decoded": choice.new_tokens,
        "n_accepted": choice.accepted_tokens,
        "n_remain": remaining,
        "temperature": request.sampling.temperature,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(choice.new_tokens / seconds, 2),
    }


async def tokenize(http: Request) -> Response:
    """POST /tokenize."""
    request = await _read(http, TokenizeRequest)
    service = _service(http)
    service.info()
    tokens = await service.worker.tokenize(
        request.content, add_special=request.add_special, parse_special=request.parse_special
    )
    return json_response({"tokens": tokens})


async def detokenize(http: Request) -> Response:
    """POST /detokenize."""
    tokens = (await _read(http, DetokenizeRequest)).tokens
    service = _service(http)
    vocabulary = service.info().vocabulary
    unknown = [token for token in tokens if token >= vocabulary]
    if unknown:
        message = f"tokens: there is no token {unknown[0]}; the vocabulary has {vocabulary}"
        raise ApiError(400, message, param="tokens")
    return json_response({"content": await service.worker.detokenize(tokens)})


async def apply_template(http: Request) -> Response:
    """POST /apply-template."""
    messages = (await _read(http, TemplateRequest)).messages
    service = _service(http)
    service.info()
    prompt = await service.worker.apply_template([message.plain() for message in messages])
    return json_response({"prompt": prompt})


# for monitoring


async def health(http: Request) -> Response:
    """GET /health."""
    if _service(http).worker.ready:
        return json_response({"status": "ok"})
    loading = {"status": "loading", **not_ready().body()}
    return json_response(loading, 503, {"Retry-After": "5"})


async def metrics(http: Request) -> Response:
    """GET /metrics, in Prometheus's text format."""
    page = _service(http).metrics.page()
    return Response(page, headers={"Content-Type": CONTENT_TYPE_LATEST})


# the page


def _page(file: str) -> Callable[[Request], Awaitable[Response]]:
    async def page(http: Request) -> Response:
        return FileResponse(WEB / file, headers=_PAGE_HEADERS)

    return page


ROUTES = [
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/props", props),
    Route("/slots", slots),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/apply-template", apply_template, methods=["POST"]),
    Route("/health", health),
    Route("/metrics", metrics),
    *(Route(path, _page(file)) for path, file in PAGE.items()),
]
