"""Requests to stop a run: a Ctrl-C or SIGTERM sets an event; the end of a parent interrupts.

Knows nothing of training.
"""

from __future__ import annotations

import contextlib
import os
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


def interrupt_at_end_of(descriptor: int) -> None:
    """Interrupt this process as Ctrl-C does when a file ends, as a pipe does with its parent."""

    def wait() -> None:
        # Not through sys.stdin: whoever waits there holds a lock that Python's end wants.
        while os.read(descriptor, 1024):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()
