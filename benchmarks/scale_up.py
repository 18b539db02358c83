"""The command that builds a benchmark model: one that behaves as a small model and costs more.

    python benchmarks/scale_up.py --shape 1b --type q4_0 [--output_type q4_0]

Writes the GGUF and the draft heads that go with it, both at full width, and prints the variables
to use them with. A file that is there already is used again. How a model is built stands in
model/evaluation/scaled_model.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter

if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from model.base.known_models import BUNDLED
from model.evaluation.scaled_model import (
    OUT,
    OUTPUT_TYPES,
    SHAPES,
    TYPES,
    build,
)
from model.training.command import errors_in_one_line


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1b")
@click.option("--type", "kind", type=click.Choice(TYPES, case_sensitive=False), default="Q4_0")
@click.option(
    "--output_type",
    type=click.Choice(OUTPUT_TYPES, case_sensitive=False),
    help="Of the LM head, to make it differ.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    default=BUNDLED,
    show_default="the bundled model",
)
@click.option(
    "--heads",
    type=click.Path(path_type=Path),
    show_default="those that belong to the base model",
)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default="build/scaled")
def main(
    shape: str, kind: str, output_type: str | None, base: Path, heads: Path | None, out: Path
) -> None:
    """Build a model that behaves as a small one and costs as much as a large one."""
    began = perf_counter()
    with errors_in_one_line():
        scaled = build(shape, kind, output_type, base=base, heads=heads, out=out)
    size_gb = scaled.model.stat().st_size / 1e9
    seconds = perf_counter() - began
    click.echo(f"{os.path.relpath(scaled.model)}: {size_gb:.2f} GB, {seconds:.0f} s")
    click.echo(f"{scaled.variables()} python main.py bench")


if __name__ == "__main__":
    main()
