"""Commands that end well: what a user can cause is one line and an exit status.

Knows no options.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from model.errors import MedusaError


def script_command(script: Path) -> str:
    """Return what to type to run a script with this interpreter, from any folder."""
    return f"{shlex.quote(sys.executable or 'python')} {shlex.quote(str(script.resolve()))}"


@contextmanager
def errors_in_one_line(stopped: str = "stopped") -> Iterator[None]:
    """Turn what a user can cause into one line and status 2; Ctrl-C says `stopped`, status 130."""
    try:
        yield
    except (MedusaError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {message}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (click.Abort, KeyboardInterrupt):
        click.echo(stopped, err=True)
        sys.exit(130)


def run_command(command: click.Command, stopped: str) -> None:
    """Run a command."""
    with errors_in_one_line(stopped):
        command.main(standalone_mode=False)
