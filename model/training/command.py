"""How a runnable file of model/ ends when something is wrong: one line and an exit status. Knows no options."""

from __future__ import annotations

import sys

import click

from model.errors import MedusaError


def run_command(command: click.Command, stopped: str) -> None:
    """Run a command; what a user can cause is one line and exit status 2, Ctrl-C says `stopped` and gives 130."""
    try:
        command.main(standalone_mode=False)
    except (MedusaError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {message}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(stopped, err=True)
        sys.exit(130)
