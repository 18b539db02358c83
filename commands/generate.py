"""Write one text."""

from __future__ import annotations

from typing import Any

import click

from commands.common import (
    open_decoder,
    open_engine,
    with_sampling,
)
from config import Settings
from model.decoding.sampling import SamplingParams


@click.command()
@click.argument("prompt")
@with_sampling
@click.option("--top_p", default=1.0)
@click.option("--top_k", default=0)
@click.option("--seed", default=0)
@click.option("--stop", multiple=True, help="End the text before this string; may be given several times.")
@click.option("--stream", is_flag=True, help="Print the text as it is written.")
def generate(
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    stream: bool,
    **drafting: Any,
) -> None:
    """Continue PROMPT."""
    sampling = SamplingParams(temperature, top_k, top_p, seed)
    engine = open_engine(Settings.load())
    request = engine.request(prompt, max_tokens, sampling=sampling, stop=stop)
    decoder = open_decoder(engine, sampling, **drafting)
    generation = decoder.start(request)
    text = []
    try:
        for piece in generation:
            text.append(piece)
            if stream:
                click.echo(piece, nl=False)
    finally:  # Ctrl-C leaves what was written
        click.echo("" if stream else "".join(text))
    stats = generation.slot.stats
    click.echo(
        f"{len(generation.tokens)} tokens, {len(generation.tokens) / stats.seconds:.1f} tokens/s, acceptance length "
        f"{stats.acceptance_length:.2f}, {sum(stats.drafted) / max(stats.steps, 1):.1f} nodes drafted a step, "
        f"{generation.finish_reason}",
        err=True,
    )
