"""The options of a training run on the command line: which value wins, and where it comes from.

Command line before YAML file (`--config`) before the run that is resumed (`--resume_from`) before
the defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from model.training.checkpoints import read_run
from model.training.options import TrainOptions, read_config


def _from_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Let the YAML file set what the command line doesn't."""
    values = read_config(path) if path else {}
    context.default_map = {**(context.default_map or {}), **values}


def _from_run(context: click.Context, parameter: click.Parameter, folder: str) -> str:
    """Let the run that is resumed set what neither command line nor YAML file does."""
    if folder:
        saved = {
            name: value
            for name, value in read_run(Path(folder))["options"].items()
            if name != "output_dir"
        }
        context.default_map = {**saved, **(context.default_map or {})}
    return folder


def train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --config and all fields of TrainOptions as options."""
    hints = get_type_hints(TrainOptions)
    for item in reversed(fields(TrainOptions)):
        kind = hints[item.name]
        least = item.metadata["least"]
        below = item.metadata["below"]
        most = item.metadata["most"] if below is None else below
        if kind == (int | None):  # None: chosen from the data
            kind = int
        if get_origin(kind) is Literal:
            kind = click.Choice(get_args(kind))
        elif kind is int and least is not None:
            kind = click.IntRange(min=int(least))
        elif least is not None:
            kind = click.FloatRange(min=least, max=most, max_open=below is not None)
        shown = item.default not in ("", None)
        resumes = item.name == "resume_from"
        decorate = click.option(
            f"--{item.name}", type=kind, default=item.default, show_default=shown,
            help=item.metadata["help"], is_eager=resumes, callback=_from_run if resumes else None,
        )  # fmt: skip
        command = decorate(command)
    from_file = click.option(
        "--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False,
        callback=_from_config, help="YAML file that sets any of these; the command line wins.",
    )  # fmt: skip
    return from_file(command)
