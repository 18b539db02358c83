"""The command line: one click group; each command has a file in commands/.

Settings come from environment variables (config.py). Knows nothing of what the commands do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# numpy's threads would fight llama.cpp's (README)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# threads wait awake for 3 ms, as between two decodes
os.environ.setdefault("GOMP_SPINCOUNT", "300000")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from typing import Any

import click

from commands.bench import bench
from commands.chat import chat
from commands.demo import demo
from commands.generate import generate
from commands.requantize import requantize_command
from commands.serve import serve
from commands.tune import tune
from commands.verify import verify
from model.training.command import errors_in_one_line


class Commands(click.Group):
    """The group of all commands; errors that a user can cause are one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was typed."""
        with errors_in_one_line():
            return super().invoke(ctx)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"show_default": True, "max_content_width": 120},
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Speculative decoding for any GGUF: drafts of many kinds, verified by unmodified llama.cpp.

    MODEL_PATH names the model, the README lists all environment variables. Without a command, serve
    the model.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(serve)


for command in (serve, chat, generate, bench, tune, requantize_command, verify, demo):
    cli.add_command(command)

if __name__ == "__main__":
    cli()
