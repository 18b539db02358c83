"""Requests to stop a run: the first Ctrl-C or SIGTERM sets an event. Knows nothing of training."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click


@contextlib.contextmanager
def stop_on_request() -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts as usual.

    A second SIGTERM doesn't: torchrun sends several.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, former[signal.SIGINT])
        click.echo("\nstopping after this step (once more: at once, without saving)", err=True)

    former: dict[int, Any] = {
        number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
