"""Chat in the terminal: answers as they are written, what came free in its own colour."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator, Iterator
from typing import Any

import click

from commands.common import open_decoder, open_engine, with_sampling
from config import Settings
from model.base.chat import CHOICES, ChatTemplate, Message, chosen_template
from model.decoding.batching import Batch
from model.decoding.sampling import SamplingParams
from model.decoding.slot import STAGES, Stats
from model.engine import Decoder, Engine
from model.errors import ContextError
from model.serving.jobs import Job, Piece, Sampling
from model.serving.writing import Writing


class Talk:
    """A conversation: what was said, and the cells that hold it, so that each turn reads only what is new.

    template: what makes one text of it; None: the model goes on with the text as it stands.
    """

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        sampling: SamplingParams,
        max_tokens: int,
        system: str,
        template: ChatTemplate | None,
    ) -> None:
        self._engine, self._decoder, self._sampling, self._max_tokens = engine, decoder, sampling, max_tokens
        self._template = template
        self._said: list[Message] = [{"role": "system", "content": system}] if system else []
        base = decoder.base
        self._batch = Batch(base, decoder.plan, places=1, cells=base.n_ctx, keep=engine.model.can_roll_back)
        self.writing: Writing | None = None

    def answer(self, line: str) -> Generator[Piece, None, None]:
        """Yield the answer as it becomes certain. Raises ContextError when the conversation is too long."""
        self._said.append({"role": "user", "content": line})
        writing = self.writing = self._start()
        self._batch.admit(writing.slot)
        writing.admitted()
        text = ""
        try:
            while not writing.slot.finished:
                self._batch.step()
                for event in writing.events():
                    if isinstance(event, Piece):
                        text += event.text
                        yield event
        finally:  # stopped or not: what was written has been said
            if not writing.slot.finished:
                self._batch.evict(writing.slot)
            self._said.append({"role": "assistant", "content": text})

    def _start(self) -> Writing:
        engine, s = self._engine, self._sampling
        if self._template is not None:
            text = self._template.render(self._said, prompt=True)
        else:
            text = "".join(message["content"] for message in self._said)
        tokens, bos = engine.model.tokenize(text, parse_special=self._template is not None).tolist(), engine.model.bos
        job = Job("chat", text, self._max_tokens, Sampling(s.temperature, s.top_p, s.top_k, seed=s.seed))
        try:
            return Writing(
                job,
                tokens[1:] if tokens[:2] == [bos, bos] else tokens,
                engine.model,
                context=engine.context,
                draws=0,
                drafter=self._decoder.drafter,
                ngrams=self._decoder.ngrams,
            )
        except ContextError:
            self._said.pop()
            raise


def profile(writing: Writing) -> str:
    """Say what an answer took, stage by stage."""
    slot, stats = writing.slot, writing.slot.stats
    steps, new = max(1, stats.steps), len(slot.tokens) - slot.prompt_length
    head = (
        f"{new} tokens, {new / max(stats.seconds, 1e-9):.1f} tokens/s, {stats.acceptance_length:.2f} tokens a step, "
        f"{sum(stats.drafted) / steps:.1f} nodes drafted a step; {slot.prompt_length - slot.reused} tokens read, "
        f"{slot.reused} were in the cache"
    )
    return "\n".join([head, *(_stage(stats, name, steps) for name in STAGES)])


def _stage(stats: Stats, name: str, steps: int) -> str:
    seconds = float(getattr(stats, f"{name}_s"))
    return f"  {name:<7}{1e6 * seconds / steps:9.0f} us a step {seconds / max(stats.seconds, 1e-9):7.1%}"


@click.command()
@with_sampling
@click.option("--top_p", default=1.0)
@click.option("--top_k", default=0)
@click.option("--seed", default=0)
@click.option("--system", default="", help="Said to the model before all else.")
@click.option(
    "--chat_template",
    default="auto",
    type=click.Choice(CHOICES),
    help="auto: the GGUF's own; without one the model goes on with the text. Or say which.",
)
@click.option("--profile", "profiled", is_flag=True, help="After each answer, say where the time went.")
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
    """Chat with the model; what a draft won is green. Ctrl+C ends an answer, Ctrl+D the conversation."""
    sampling, engine = SamplingParams(temperature, top_k, top_p, seed), open_engine(Settings.load())
    with open_decoder(engine, sampling, **drafting) as decoder:
        template = chosen_template(engine.file.metadata, chat_template)
        talk = Talk(engine, decoder, sampling, max_tokens, system, template)
        for line in lines():
            try:
                with ctrl_c() as pressed, contextlib.closing(talk.answer(line)) as pieces:
                    for piece in pieces:
                        show(piece)
                        if pressed:
                            break
            except ContextError as error:
                click.echo(f"error: {error}", err=True)
                continue
            click.echo()
            if profiled and talk.writing is not None:
                click.echo(profile(talk.writing), err=True)


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """Note Ctrl+C in a list: an answer is ended between two steps; within one the cache would be left in disorder."""
    pressed = list[int]()
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """Yield what the user types, line by line; a backslash at the end goes on with the next."""
    text = ""
    while True:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        text += line[:-2] + "\n" if line.endswith("\\\n") else line.rstrip("\n")
        if not line.endswith("\\\n"):
            if text:
                yield text
            text = ""


def show(piece: Piece) -> None:
    """Print a piece, drafted tokens in green; where the tokens are not the whole text, it goes uncoloured."""
    if "".join(token.text for token in piece.tokens) != piece.text:
        click.echo(piece.text, nl=False)
        return
    for token in piece.tokens:
        click.echo(click.style(token.text, fg="green") if token.drafted else token.text, nl=False)
