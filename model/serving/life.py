"""One life of the process that owns the model, as its parent holds it: started, spoken to, heard, ended.

Knows no jobs: what the process says is passed on as it comes.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from model.serving.model_process import ModelOptions, run

QUIT_S = 2.0  # until a process that was asked to go is killed


class Life:
    """A process, its two pipes, and the thread that reads what it says.

    take: is called in the loop with this life and what the process says. lost: with this life, once the process has
    gone; it is to `shut` the pipes.
    """

    def __init__(
        self,
        options: ModelOptions,
        loop: asyncio.AbstractEventLoop,
        take: Callable[..., None],
        lost: Callable[[Life], None],
    ) -> None:
        self._loop, self._take, self._lost = loop, take, lost
        context = multiprocessing.get_context("spawn")
        inbox, self._to = context.Pipe(duplex=False)
        self._source, outbox = context.Pipe(duplex=False)
        self.process = context.Process(target=run, args=(options, inbox, outbox), name="model", daemon=True)
        self.ready = False
        self.process.start()
        atexit.register(self.process.kill)  # where nobody has closed; before multiprocessing would wait for it
        inbox.close()
        outbox.close()
        self._reader = threading.Thread(target=self._read, name="model-events", daemon=True)
        self._reader.start()

    def send(self, *command: Any) -> None:
        """Tell the process something; where it has died, the reader will say so."""
        with suppress(OSError):
            self._to.send(command)

    def _read(self) -> None:
        """Pass on what the process says until it has gone; runs in a thread."""
        with suppress(RuntimeError):  # the loop is closed
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._take, self, *self._source.recv())
            except Exception:  # it has gone, or was killed within a message
                self.process.join()
                self._loop.call_soon_threadsafe(self._lost, self)

    async def end(self) -> None:
        """Ask the process to go, and kill it where it does not."""
        self.send("quit")
        await asyncio.to_thread(self._wait)
        self.shut()

    def _wait(self) -> None:
        self._reader.join(QUIT_S)  # which waits for the process
        if self._reader.is_alive():
            self.process.kill()
            self._reader.join()

    def shut(self) -> None:
        """Close the pipes; in the event loop only, as two threads might close one descriptor twice."""
        atexit.unregister(self.process.kill)
        self._to.close()
        self._source.close()
