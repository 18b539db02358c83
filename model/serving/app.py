"""The web server put together: routes, errors, security, metrics around a worker. Reads no environment."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from model.serving.errors import add_handlers
from model.serving.metrics import CountRequests, Metrics
from model.serving.protocol import Worker
from model.serving.routes import OPEN_PATHS, Service, router
from model.serving.security import BodyLimit, HostCheck, KeyCheck


@dataclass(frozen=True)
class ServerOptions:
    """How the server guards itself; most fields are the environment variables of the same names."""

    host: str = "127.0.0.1"
    api_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_queue: int = 64
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0


def create_app(worker: Worker, options: ServerOptions) -> FastAPI:
    """Return the server. The worker may still be loading; whoever started it closes it."""
    metrics = Metrics(worker)
    # no OpenAPI pages: they load scripts from elsewhere
    app = FastAPI(title="medusa-gguf", openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(router(Service(worker, metrics, options.max_queue, options.request_timeout_s)))
    add_handlers(app)
    # the last one added is the first one asked
    app.add_middleware(BodyLimit, options.max_body_bytes, options.body_timeout_s)
    if options.api_key:
        app.add_middleware(KeyCheck, options.api_key, OPEN_PATHS)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(HostCheck, options.host, options.allowed_hosts, options.cors_origins)
    app.add_middleware(CountRequests, metrics)
    return app
