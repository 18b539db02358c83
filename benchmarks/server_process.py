"""A server to be measured: `main.py` in a process of its own. Knows no requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Server:
    """`main.py` at work."""

    address: str
    pid: int


@contextmanager
def server(**variables: str) -> Iterator[Server]:
    """Start `main.py` on a free port, and end it."""
    env = {**os.environ, "HOST": "127.0.0.1", "PORT": "0", **variables}
    command = [sys.executable, str(ROOT / "main.py")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = (line for line in process.stdout if line.startswith("page and API"))
            ready = next(lines, None)
            if ready is None:
                raise click.ClickException("the server did not start")
            yield Server(ready.split()[-1], process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
