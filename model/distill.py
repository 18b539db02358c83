"""The distilling recipe: read prompts, let the base model answer them, keep the ids.

Heads learn best from what their base model says itself.

python model/distill.py --base_model_path X.gguf --prompts chats.jsonl --output answers.jsonl
python model/distill.py --base_model_path chat.gguf --output answers.jsonl    # it asks itself, too
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # numpy's threads beside llama.cpp's make both slow.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402

from config import Settings  # noqa: E402
from model.base.chat import ChatTemplate, chosen_template  # noqa: E402
from model.base.gguf_file import GGUFFile  # noqa: E402
from model.base.known_models import model_file  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.base.load_check import check_loads  # noqa: E402
from model.errors import DataError  # noqa: E402
from model.training.command import run_command, script_command  # noqa: E402
from model.training.data.prompts import Prompt, make_prompts  # noqa: E402
from model.training.data.records import read_records  # noqa: E402
from model.training.distillation.answers import (  # noqa: E402
    AnswerFile,
    DistilledAnswer,
)
from model.training.distillation.endpoint import (  # noqa: E402
    Endpoint,
)
from model.training.distillation.local_source import LocalSource  # noqa: E402
from model.training.distillation.options import OPTIONS, DistillOptions  # noqa: E402
from model.training.distillation.progress_bar import ProgressBar  # noqa: E402
from model.training.distillation.question_file import QuestionFile  # noqa: E402
from model.training.stopping import interrupt_at_end_of  # noqa: E402

NAMED = 5  # records that cannot be used are named up to here, then counted


def distill(options: DistillOptions) -> None:
    """Answer all prompts that the output has no answer to yet. Raises MedusaError."""
    settings = Settings.load()
    logging.basicConfig(level=settings.log_level, format="%(message)s")
    options.check()
    endpoint = options.endpoint()

    # The model: its vocabulary for both sources, its chat template where it has one.
    file = check_loads(model_file(options.base_model_path or str(settings.model_path)))
    chosen = chosen_template(file.metadata, options.chat_template)
    template = chosen or ChatTemplate(None)
    max_length = options.length(file.context_length)
    chat = chosen is not None
    # The prompts, before anything is written: users' turns, given or (None) the model's own; of
    # texts pieces to continue.
    given = None
    if not chat or options.prompts or endpoint:
        given = wanted_prompts(options, chat=chat)
    kind = "answers chats" if chosen else "continues texts"
    click.echo(f"model   {file.name} ({file.file_type}): {kind}")

    with contextlib.ExitStack() as opened:
        answers = opened.enter_context(
            AnswerFile(path=options.output, facts=facts(file), identity=options.identity(file))
        )
        model = opened.enter_context(contextlib.closing(load_model(file, settings)))
        source = LocalSource(
            options, model, template, max_length=max_length, fingerprint=file.file_fingerprint(),
            n_threads=settings.n_threads, flash_attn=settings.flash_attn,
            kv_type=settings.kv_type,
        )  # fmt: skip

        fill(options, answers, source, endpoint, given)


def fill(
    options: DistillOptions,
    answers: AnswerFile,
    source: LocalSource,
    endpoint: Endpoint | None,
    given: list[Prompt] | None,
) -> None:
    """Write the missing answers into the file, and say what there is now.

    given: the prompts; None: the model's own.
    """
    questions = None
    prompts = given
    if prompts is None:
        questions = QuestionFile(answers.folder / "questions.jsonl")
        prompts = source.ask_itself(questions)
    todo = [prompt for prompt in prompts if prompt.id not in answers.done]
    named = "its own questions" if questions else options.prompts or "standard library"
    click.echo(f"prompts {named}: {len(prompts):,}, {len(todo):,} to be answered")

    # The answers: those that are there stay, the others are written as they come.
    bar = ProgressBar(len(prompts), len(prompts) - len(todo))
    if endpoint:
        outcomes = source.answers_from(endpoint, todo, bar.tick)
    else:
        outcomes = source.answers(todo, bar.tick)
    with contextlib.closing(bar), contextlib.closing(outcomes):
        for key, outcome in outcomes:
            if isinstance(outcome, DistilledAnswer):
                answers.add(outcome)
                bar.end(key)
            else:
                bar.end(key, outcome)
    report(answers, bar)
    if questions:
        click.echo(f"        questions: {questions.summary()}")


def wanted_prompts(options: DistillOptions, *, chat: bool) -> list[Prompt]:
    """Return the prompts of the data set, and report records that hold none.

    Raises DataError where there is not one.
    """
    records = read_records(options.prompts, options.dataset_split)
    prompts, problems = make_prompts(
        records, chat=chat, lengths=options.prompt_tokens, seed=options.seed,
        most=options.max_prompts,
    )  # fmt: skip
    for problem in problems[:NAMED]:
        click.echo(f"skipped: {problem}", err=True)
    if problems:
        click.echo(f"records skipped: {len(problems):,}", err=True)
    if not prompts:
        why = f": {problems[0]}" if problems else ", it is empty"
        raise DataError(f"data set {options.prompts}: not one prompt in it{why}")
    return prompts


def load_model(file: GGUFFile, settings: Settings) -> LlamaModel:
    """Return the model as the settings say."""
    return LlamaModel(
        file.path, n_gpu_layers=settings.n_gpu_layers, use_mmap=settings.use_mmap,
        use_mlock=settings.use_mlock,
    )  # fmt: skip


def facts(file: GGUFFile) -> dict[str, Any]:
    """Return what each line says of the model: its ids are of no use to another vocabulary."""
    return {
        "base_name": file.name,
        "base_fingerprint": file.file_fingerprint(),
        "heads_fingerprint": file.heads_fingerprint(),
    }


def report(answers: AnswerFile, bar: ProgressBar) -> None:
    """Say what there is now. Raises DataError where there is nothing."""
    if not answers.done:
        raise DataError(f"none of {bar.failed} prompts was answered")
    failed = ""
    if bar.failed:
        failed = f"; {bar.failed} prompts without an answer: the same command tries them again"
    click.echo(
        f"done    {len(answers.done):,} answers, now {bar.tokens:,} tokens, "
        f"{bar.rate:,.0f} a second{failed}"
    )
    for temperature, tally in sorted(answers.by_temperature.items()):
        click.echo(
            f"        temperature {temperature:g}: {tally.answers:,} answers, "
            f"{tally.tokens:,} tokens, {tally.share_repeated:.0%} of the 8-grams repeated, "
            f"{tally.loops:,} cut where they began to loop"
        )


def say_what_next(options: DistillOptions) -> None:
    """Say what to type next."""
    script = script_command(ROOT / "model" / "train_medusa.py")
    base_model = shlex.quote(options.base_model_path or str(Settings.load().model_path))
    dataset = shlex.quote(str(options.output))
    click.echo("now     train heads on them, with")
    click.echo(f"  {script} --base_model_path {base_model} --dataset_name {dataset}")


def _click_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command()
@_click_options
@click.option("--stop_with_stdin", is_flag=True, hidden=True, help="Stop when standard input ends.")
def main(stop_with_stdin: bool, **values: Any) -> None:
    """Let the base model answer prompts: its answers are what draft heads learn from best."""
    if stop_with_stdin:
        interrupt_at_end_of(sys.stdin.fileno())
    options = DistillOptions(**values)
    distill(options)
    say_what_next(options)


def run() -> None:
    """Run the command."""
    again = f"{script_command(Path(__file__))} {shlex.join(sys.argv[1:])}"
    run_command(
        main, f"stopped; finished answers are kept, and the same command goes on:\n  {again}"
    )


if __name__ == "__main__":
    run()
