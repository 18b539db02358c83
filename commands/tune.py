"""What drafting costs and wins on this machine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from commands.common import (
    open_engine,
    prompts_option,
    trial,
)
from config import Settings
from model.decoding.sampling import SamplingParams
from model.measuring.report import check_writable, read_prompts
from model.measuring.tuning import live_decoder, tuned


@click.command()
@prompts_option
@click.option("--temperature", default=0.0, help="0 is greedy.")
@click.option("--draft_vocab", type=click.IntRange(0), help="As for generate and bench.")
@click.option(
    "--max_tokens", default=96, type=click.IntRange(16), help="New tokens per text, to measure the best tree."
)
@click.option("--n_prompts", default=6, type=click.IntRange(1), help="Measure on the first so many prompts.")
@click.option("--png", default="tune.png", type=click.Path(path_type=Path), help="Where the picture goes.")
@click.option("--types", help="Also say what other types would bring, such as q4_0,q4_0+q4_0,bf16 (file+LM head).")
@click.option("--full", is_flag=True, help="With --types: time whole copies (in TMPDIR), not some of their layers.")
def tune(
    prompts: Path,
    temperature: float,
    draft_vocab: int | None,
    max_tokens: int,
    n_prompts: int,
    png: Path,
    types: str | None,
    full: bool,
) -> None:
    """Measure what a step costs here, find the tree that pays, and try it."""
    from model.measuring.speed import compare
    from model.measuring.tuning_report import draw
    from model.measuring.tuning_report import table as tuning_table
    from model.measuring.types import compare_types, parse_types
    from model.measuring.types import table as types_table

    check_writable(png)
    names = parse_types(types) if types is not None else []
    engine, sampling = open_engine(Settings.load()), SamplingParams(temperature)
    heads = engine.weights is not None
    if not heads:
        click.echo(f"no heads for {engine.file.name}: only the text so far can draft", err=True)
    tuning = tuned(engine, trial(engine, sampling), heads=heads, draft_vocab=draft_vocab, afresh=True, budget_s=3.0)
    choices = tuning.choices(tuning.curve.contexts[0], engine.options.max_nodes)
    best = tuning.best(tuning.curve.contexts[0], engine.options.max_nodes)
    click.echo(f"{engine.file.name} ({engine.file.file_type}), {engine.options.n_threads} threads")
    click.echo(tuning_table(tuning, choices, best))
    requests = [
        engine.request(p, max_tokens, sampling=replace(sampling, seed=i))
        for i, p in enumerate(read_prompts(prompts)[:n_prompts])
    ]
    with ExitStack() as stack:
        ways = {"the live plan": live_decoder(engine, tuning, ngrams=True, draft_vocab=draft_vocab)}
        if len(best.tree) > 1:
            ways["this tree in every step"] = engine.decoder(best.tree, draft_vocab=draft_vocab)
        for way in ways.values():
            stack.enter_context(way)
        results = compare(engine, requests, *ways.values(), runs=1)
    for name, result in zip(ways, results, strict=True):
        click.echo(
            f"measured on {len(requests)} prompts, {name}: {result['speedup']:.2f}x, "
            f"{result['acceptance_length']:.2f} tokens a step, {result['tree_nodes'] - 1:.1f} drafted"
        )
    draw(png, tuning, choices, best)
    click.echo(f"picture: {png}")
    if names:
        rows = compare_types(
            engine, tuning, names, full=full, told=lambda what: click.echo(f"timing {what} ...", err=True)
        )
        click.echo(types_table(rows))
