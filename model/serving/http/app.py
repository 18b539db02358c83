"""The web application: routes, errors, security and metrics around a worker.

Reads no environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from model.serving.http.errors import EXCEPTION_HANDLERS
from model.serving.http.metrics import CountRequests, Metrics
from model.serving.http.routes import OPEN_PATHS, ROUTES
from model.serving.http.security import BodyLimit, HostCheck, KeyCheck
from model.serving.http.service import Service
from model.serving.worker.protocol import Worker


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server guards itself.

    Most fields are the environment variables of the same names.
    """

    host: str = "127.0.0.1"
    api_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_queue: int = 64
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0


def create_app(worker: Worker, options: ServerOptions) -> Starlette:
    """Return the application. The worker may still be loading; whoever started it closes it."""
    metrics = Metrics(worker)
    app = Starlette(
        routes=ROUTES,
        middleware=_middleware(metrics, options),
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.state.service = Service(
        worker=worker,
        metrics=metrics,
        max_queue=options.max_queue,
        request_timeout_s=options.request_timeout_s,
    )
    return app


def _middleware(metrics: Metrics, options: ServerOptions) -> list[Middleware]:
    """Return what a request passes on its way to a route, in this order."""
    middleware = [
        Middleware(CountRequests, metrics, ROUTES),
        Middleware(HostCheck, options.host, options.allowed_hosts, options.cors_origins),
    ]
    if options.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
        middleware.append(cors)
    if options.api_key:
        middleware.append(Middleware(KeyCheck, options.api_key, OPEN_PATHS))
    middleware.append(Middleware(BodyLimit, options.max_body_bytes, options.body_timeout_s))
    return middleware
