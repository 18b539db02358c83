"""The command chat: a conversation in the terminal, answers as they are generated.

Knows the terminal; the engine (model/engine.py) does the rest.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click

from commands.common import (
    open_engine,
    say_if_none,
    template_option,
    with_drafting,
    with_sampling,
)
from model.base.chat import Message, user_turn
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import Output
from model.engine import Completion, Engine, Stream
from model.errors import ContextError


class Conversation:
    """The messages so far; the engine's prefix cache has them, so only new ones are prefilled.

    Without a chat template the model continues the messages' contents as one text.
    """

    def __init__(
        self, engine: Engine, sampling: SamplingParams, max_tokens: int, system: str
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._messages: list[Message] = []
        if system:
            self._messages.append({"role": "system", "content": system})

    @contextlib.contextmanager
    def answer(self, line: str) -> Iterator[Stream]:
        """Give the answer to a line as a stream; what was generated joins the conversation.

        Raises ContextError when the conversation is too long; then the line is removed again.
        """
        self._messages.append(user_turn(line))
        try:
            stream = self._start()
        except ContextError:
            self._messages.pop()
            raise
        try:
            yield stream
        finally:
            stream.close()
            self._messages.append({"role": "assistant", "content": stream.completion.text})

    def _start(self) -> Stream:
        if self._engine.template is not None:
            return self._engine.chat(self._messages, self._sampling, max_tokens=self._max_tokens)
        text = "".join(message["content"] for message in self._messages)
        return self._engine.stream(text, self._sampling, max_tokens=self._max_tokens)


def profile(completion: Completion) -> str:
    """Say how fast an answer was and how its time was spent, stage by stage."""
    statistics = completion.statistics
    steps = max(1, statistics.steps)
    total = max(statistics.seconds, 1e-9)
    n_prefilled = completion.prompt_tokens - completion.cached_tokens
    lines = [
        f"{len(completion.tokens)} tokens, {completion.tokens_per_s:.1f} tokens/s, "
        f"acceptance length {completion.acceptance_length:.2f}, "
        f"{statistics.nodes_per_step:.1f} nodes drafted a step",
        f"prompt: {n_prefilled} tokens prefilled, {completion.cached_tokens} from the prefix cache",
    ]
    for stage, seconds in statistics.seconds_by_stage.items():
        lines.append(f"  {stage:<7}{1e6 * seconds / steps:9.0f} us a step {seconds / total:7.1%}")
    return "\n".join(lines)


@click.command()
@with_drafting
@with_sampling
@click.option("--system", default="", help="System message.")
@template_option
@click.option(
    "--profile", "profiled", is_flag=True, help="After each answer, show its time, stage by stage."
)
def chat(
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    system: str,
    chat_template: str,
    profiled: bool,
    **drafting: Any,
) -> None:
    """Chat with the model: accepted draft tokens are printed in green.

    Ctrl+C ends an answer, Ctrl+D the conversation. A backslash at the end of a line continues it on
    the next one.
    """
    # The engine.
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    with open_engine(chat_template, **drafting) as engine:
        engine.prepare()  # measure before the first line is asked for
        say_if_none(engine.loaded, engine.template, chat_template)

        # The conversation.
        conversation = Conversation(engine, sampling, max_tokens, system)
        for line in lines():
            try:
                with ctrl_c() as pressed, conversation.answer(line) as stream:
                    for output in stream:
                        show(output)
                        if pressed:
                            break
            except ContextError as error:
                click.echo(f"error: {error}", err=True)
                continue
            click.echo()
            if profiled:
                click.echo(profile(stream.completion), err=True)


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """Note Ctrl+C in a list, so that an answer ends between two steps.

    Interrupted within a step, the KV cache would be in disorder.
    """
    pressed = list[int]()
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """Yield what the user types, line by line; a backslash at the end continues on the next."""
    text = ""
    while True:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.endswith("\\\n"):
            text += line[:-2] + "\n"
            continue
        text += line.rstrip("\n")
        if text:
            yield text
        text = ""


def show(output: Output) -> None:
    """Print an output, accepted draft tokens in green.

    Without colour where its tokens are not the whole text.
    """
    if "".join(token.text for token in output.tokens) != output.text:
        click.echo(output.text, nl=False)
        return
    for token in output.tokens:
        text = click.style(token.text, fg="green") if token.drafted else token.text
        click.echo(text, nl=False)
