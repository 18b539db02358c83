"""The command serve: the HTTP server and the process of the model, from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import click

from commands.common import load_options, set_logging
from config import Settings
from model.errors import MedusaError

if TYPE_CHECKING:
    import uvicorn

    from model.serving.http.app import ServerOptions
    from model.serving.worker.protocol import Worker

_GRACE_S = 2  # more for the web server than for the sequences, so that their last events are sent
_HEAD_S = 30.0  # that a client may need to send the head of its request


@click.command()
def serve() -> None:
    """Serve OpenAI's API and a web page at HOST and PORT. The default command."""
    from model.serving.http.app import ServerOptions
    from model.serving.http.connections import listen
    from model.serving.http.security import is_loopback

    settings = Settings.load()
    set_logging(settings)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    if key is None and not is_loopback(settings.host):
        warning = f"warning: HOST={settings.host} admits other machines, and no API_KEY is set"
        click.echo(warning, err=True)
    options = ServerOptions(
        host=settings.host,
        api_key=key,
        cors_origins=settings.origins,
        allowed_hosts=settings.hosts,
        max_queue=settings.max_queue,
        max_body_bytes=settings.max_body_bytes,
        request_timeout_s=settings.request_timeout,
    )
    # Before the model loads: a taken port is reported at once.
    with listen(settings.host, settings.port) as listener:
        asyncio.run(run(settings, options, listener))


async def run(settings: Settings, options: ServerOptions, listener: socket.socket) -> None:
    """Serve until a signal comes. Raises MedusaError where model or heads cannot be used."""
    import uvicorn

    from model.serving.http.app import create_app
    from model.serving.http.connections import Server, protocol

    worker = start_worker(settings)
    config = uvicorn.Config(
        create_app(worker, options),
        log_config=None,
        access_log=settings.log_level in ("DEBUG", "INFO"),
        server_header=False,
        ws="none",
        http=protocol(_HEAD_S),
        timeout_graceful_shutdown=settings.shutdown_timeout + _GRACE_S,
    )
    server = Server(config, worker, settings.shutdown_timeout)
    address = f"http://{shown_host(settings.host)}:{listener.getsockname()[1]}"
    greeting = asyncio.create_task(greet(worker, server, address, key=options.api_key is not None))
    try:
        await server.serve(sockets=[listener])
    finally:
        greeting.cancel()
        await worker.close(0)  # a second Ctrl+C skips the server's own end
    with contextlib.suppress(asyncio.CancelledError):
        await greeting


def start_worker(settings: Settings) -> Worker:
    """Start the process that owns the model; it loads while the server already answers /health."""
    from model.serving.worker.served_model import ModelOptions
    from model.serving.worker.worker import ModelWorker

    options = ModelOptions(
        model_path=settings.model_path,
        load=load_options(settings),
        heads_path=settings.medusa_weights_path,
        slots=settings.n_parallel,
        cells=settings.cache_tokens,
        log_level=settings.log_level,
    )
    worker = ModelWorker(options, max_queue=settings.max_queue)
    worker.start()
    return worker


def shown_host(host: str) -> str:
    """Return the name under which this machine reaches a server bound to `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name


async def greet(worker: Worker, server: uvicorn.Server, address: str, *, key: bool) -> None:
    """Say what is served and where, as soon as it is.

    Ends the server where the model cannot be loaded.
    """
    try:
        await worker.wait_ready()
    except MedusaError:
        server.should_exit = True
        raise
    click.echo(banner(worker, address, key=key))


def banner(worker: Worker, address: str, *, key: bool) -> str:
    """Return the lines that are printed at the start: model, draft sources, address, an example."""
    info = worker.info
    secret = '-H "Authorization: Bearer $API_KEY" ' if key else ""
    return (
        f"{info.name} ({info.file_type}), {info.context:,} tokens of context, "
        f"{info.slots} sequences at once, KV cache of {info.cells:,} tokens\n"
        f"drafts: {info.draft}\n"
        f"page and API: {address}\n"
        f"  curl {address}/v1/completions {secret}-H 'Content-Type: application/json' "
        '-d \'{"prompt": "import os", "max_tokens": 64}\''
    )
