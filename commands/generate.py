"""The command generate: answer one prompt, or continue it.

Knows options and messages; the engine (model/engine.py) does the rest.
"""

from __future__ import annotations

from typing import Any

import click

from commands.common import (
    open_engine,
    say_if_none,
    template_option,
    with_drafting,
    with_sampling,
)
from model.base.chat import user_turn
from model.decoding.sampling import SamplingParams
from model.engine import Completion


@click.command()
@click.argument("prompt")
@template_option
@with_drafting
@with_sampling
@click.option(
    "--stop", multiple=True, help="End the output before this string; may be given several times."
)
@click.option("--stream", is_flag=True, help="Print the text as it is generated.")
def generate(
    prompt: str,
    chat_template: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    stream: bool,
    **drafting: Any,
) -> None:
    """Answer PROMPT, and say on standard error how fast it was.

    For a model with a chat template PROMPT is what a user says; for others, and with
    --chat_template none, it is a text to continue.
    """
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    with open_engine(chat_template, **drafting) as engine:
        if engine.template is None:
            outputs = engine.stream(prompt, sampling, max_tokens=max_tokens, stop=stop)
        else:
            said = [user_turn(prompt)]
            outputs = engine.chat(said, sampling, max_tokens=max_tokens, stop=stop)
        say_if_none(engine.loaded, engine.template, chat_template)
        try:
            for output in outputs:
                if stream:
                    click.echo(output.text, nl=False)
        finally:  # Ctrl+C: what was generated is printed all the same
            outputs.close()
            click.echo("" if stream else outputs.completion.text)
        click.echo(summary(outputs.completion), err=True)


def summary(completion: Completion) -> str:
    """Say in a line how fast it was and what drafting brought."""
    return (
        f"{len(completion.tokens)} tokens, {completion.tokens_per_s:.1f} tokens/s, "
        f"acceptance length {completion.acceptance_length:.2f}, "
        f"{completion.statistics.nodes_per_step:.1f} nodes drafted a step, "
        f"finish reason: {completion.finish_reason}"
    )
