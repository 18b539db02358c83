"""The command requantize: the same model as a file of another type."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from config import Settings
from model.base.gguf_file import GGUFFile, requantize
from model.base.load_check import check_loads
from model.base.quantizer import quality_warning
from model.errors import OutputError


@click.command("requantize")
@click.argument("out", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "kind",
    required=True,
    help="Type of the new file, such as q4_0, q4_k_m, q8_0 or bf16.",
)
@click.option(
    "--output_type",
    help="Type of the LM head, such as q4_0 or q6_k.  [default: llama.cpp's for the file's type]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.gguf where it exists.")
def requantize_command(out: Path, kind: str, output_type: str | None, overwrite: bool) -> None:
    """Write MODEL_PATH as OUT.gguf, of another type; `tune --types` says which is fastest."""
    settings = Settings.load()
    logging.basicConfig(level=settings.log_level, format="%(message)s")
    source = GGUFFile(settings.model_path)
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; name another file or use --overwrite")
    warning = quality_warning(source.file_type, kind)
    if warning:
        click.echo(f"warning: {warning}", err=True)
    requantize(settings.model_path, out, kind, output_type, threads=settings.n_threads)
    made = check_loads(out)
    made_mb = out.stat().st_size / 1e6
    source_mb = sum(path.stat().st_size for path in source.paths) / 1e6
    click.echo(
        f"{out}: {made.file_type}, {made_mb:.1f} MB (from {source.file_type}, {source_mb:.1f} MB)"
    )
    click.echo(f"to measure it: MODEL_PATH={out} python main.py tune")
