"""The parent's handle on the process that owns the model: starts it, talks to it, ends it.

Knows no requests: what the process sends is passed on as it comes.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from model.serving.worker.model_process import run
from model.serving.worker.served_model import ModelOptions

QUIT_S = 2.0  # until a process that was asked to end is killed


class ProcessHandle:
    """One process, its two pipes, and the thread that reads what it sends.

    on_message: called in the loop with this handle and a message of the process.
    on_exit: called in the loop with this handle once the process has ended; it is to `close_pipes`.
    ready: whether the process has loaded the model; set by whoever reads the messages.
    """

    def __init__(
        self,
        options: ModelOptions,
        *,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[..., None],
        on_exit: Callable[[ProcessHandle], None],
    ) -> None:
        self._loop = loop
        self._on_message = on_message
        self._on_exit = on_exit
        self.ready = False

        context = multiprocessing.get_context("spawn")
        child_inbox, self._to_child = context.Pipe(duplex=False)
        self._from_child, child_outbox = context.Pipe(duplex=False)
        pipes = (options, child_inbox, child_outbox)
        self.process = context.Process(target=run, args=pipes, name="model", daemon=True)
        self.process.start()
        # For a parent that ends without closing: before multiprocessing would wait for the process.
        atexit.register(self.process.kill)
        child_inbox.close()
        child_outbox.close()
        self._reader = threading.Thread(target=self._read, name="model-events", daemon=True)
        self._reader.start()

    def send(self, *command: Any) -> None:
        """Send the process a command; where it has ended, the reader will notice."""
        with suppress(OSError):
            self._to_child.send(command)

    def _read(self) -> None:
        """Pass on what the process sends until it has ended; runs in a thread."""
        with suppress(RuntimeError):  # the loop is closed
            try:
                while True:
                    message = self._from_child.recv()
                    self._loop.call_soon_threadsafe(self._on_message, self, *message)
            except Exception:  # it has ended, or was killed within a message
                self.process.join()
                self._loop.call_soon_threadsafe(self._on_exit, self)

    async def end(self) -> None:
        """Ask the process to end, and kill it where it does not."""
        self.send("quit")
        await asyncio.to_thread(self._wait)
        self.close_pipes()

    def _wait(self) -> None:
        self._reader.join(QUIT_S)  # which waits for the process
        if self._reader.is_alive():
            self.process.kill()
            self._reader.join()

    def close_pipes(self) -> None:
        """Close the pipes. In the event loop only: two threads might close one descriptor twice."""
        atexit.unregister(self.process.kill)
        self._to_child.close()
        self._from_child.close()
