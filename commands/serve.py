"""Serve the model."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import click

from commands.common import PROMPTS, engine_options, set_logging
from config import HEADS_FOLDER, Settings
from model.errors import MedusaError, UsageError
from model.measuring.report import read_prompts

if TYPE_CHECKING:
    import uvicorn

    from model.serving.app import ServerOptions
    from model.serving.protocol import Worker

_GRACE = 2  # seconds more for the web server than for the texts, so that their last words are sent
_HEAD_S = 30.0  # that a client may take to say what it wants


@click.command()
def serve() -> None:
    """Serve the model: OpenAI's API and a web page at HOST and PORT (what happens without a command)."""
    from model.serving.app import ServerOptions
    from model.serving.security import is_loopback

    settings = Settings.load()
    set_logging(settings)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    if key is None and not is_loopback(settings.host):
        click.echo(f"warning: HOST={settings.host} lets others in, and no API_KEY is asked for", err=True)
    options = ServerOptions(
        host=settings.host,
        api_key=key,
        cors_origins=settings.origins,
        allowed_hosts=settings.hosts,
        max_queue=settings.max_queue,
        max_body_bytes=settings.max_body_bytes,
        request_timeout_s=settings.request_timeout,
    )
    with listen(settings.host, settings.port) as listener:  # a taken port is told before the model loads
        asyncio.run(run(settings, options, listener))


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UsageError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise UsageError(f"cannot listen on HOST={host}, PORT={port}: {error.strerror or error}") from None


async def run(settings: Settings, options: ServerOptions, listener: socket.socket) -> None:
    """Serve until a signal comes. Raises MedusaError where model or heads cannot be used."""
    import uvicorn

    from model.serving.app import create_app
    from model.serving.connections import Server, protocol

    worker = start_worker(settings)
    config = uvicorn.Config(
        create_app(worker, options),
        log_config=None,
        access_log=settings.log_level in ("DEBUG", "INFO"),
        server_header=False,
        ws="none",
        http=protocol(_HEAD_S),
        timeout_graceful_shutdown=settings.shutdown_timeout + _GRACE,
    )
    server = Server(config, worker, settings.shutdown_timeout)
    address = f"http://{shown_host(settings.host)}:{listener.getsockname()[1]}"
    telling = asyncio.create_task(tell(worker, server, address, key=options.api_key is not None))
    try:
        await server.serve(sockets=[listener])
    finally:
        telling.cancel()
        await worker.close(0)  # a second Ctrl+C skips the server's own end
    with contextlib.suppress(asyncio.CancelledError):
        await telling


def start_worker(settings: Settings) -> Worker:
    """Start the process that owns the model; it loads while the server already answers /health."""
    from model.serving.model_process import ModelOptions
    from model.serving.worker import ModelWorker

    model = ModelOptions(
        settings.model_path,
        engine_options(settings),
        settings.medusa_weights_path,
        HEADS_FOLDER,
        slots=settings.n_parallel,
        cells=settings.cache_tokens,
        trial_prompts=tuple(read_prompts(PROMPTS / "trial.jsonl")),
        log_level=settings.log_level,
    )
    worker = ModelWorker(model, max_queue=settings.max_queue)
    worker.start()
    return worker


def shown_host(host: str) -> str:
    """Return the name under which this machine reaches a server bound to `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name


async def tell(worker: Worker, server: uvicorn.Server, address: str, *, key: bool) -> None:
    """Say what is served and where, as soon as it is; end the server where the model cannot be loaded."""
    try:
        await worker.wait_ready()
    except MedusaError:
        server.should_exit = True
        raise
    click.echo(banner(worker, address, key=key))


def banner(worker: Worker, address: str, *, key: bool) -> str:
    """Return the lines that greet: address, model, what drafts, and a line to try."""
    info = worker.info
    secret = '-H "Authorization: Bearer $API_KEY" ' if key else ""
    return (
        f"{info.name} ({info.file_type}), {info.context:,} tokens of context, {info.slots} texts at once, "
        f"{info.cells:,} tokens in all\n"
        f"drafts: {info.draft}\n"
        f"page and API: {address}\n"
        f"  curl {address}/v1/completions {secret}-H 'Content-Type: application/json' "
        '-d \'{"prompt": "import os", "max_tokens": 64}\''
    )
