"""Let the base model answer prompts, so that heads learn its own words: read prompts, have them answered, keep the ids.

python model/distill.py --base_model_path X.gguf --prompts chats.jsonl --output answers.jsonl
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads beside llama.cpp's: both are slow
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    sys.path[0] = str(ROOT)

import click  # noqa: E402

from config import Settings  # noqa: E402
from model.base.chat import ChatTemplate, chosen_template  # noqa: E402
from model.base.gguf_file import GGUFFile  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.base.load_check import check_loads  # noqa: E402
from model.errors import DataError, ModelFileError  # noqa: E402
from model.training.answers import Answer, AnswerFile  # noqa: E402
from model.training.command import run_command, script_command  # noqa: E402
from model.training.dialogue import Dialogue, opening  # noqa: E402
from model.training.distill_options import OPTIONS, DistillOptions  # noqa: E402
from model.training.documents import read_records  # noqa: E402
from model.training.endpoint import Endpoint, Exchange, answer_with_endpoint  # noqa: E402
from model.training.local import answer_with_base  # noqa: E402
from model.training.progress import Progress  # noqa: E402
from model.training.prompts import Prompt, read_prompts  # noqa: E402
from model.training.text import PartEncoder  # noqa: E402
from model.training.transcript import answer_of_text  # noqa: E402

NAMED = 5  # records that cannot be used are named up to here, then counted
Tick = Callable[[int], None]  # takes the number of tokens that were won just now
Outcomes = Generator[tuple[str, Answer | str], None, None]  # a prompt's id, and its answer or why there is none


def distill(options: DistillOptions) -> None:
    """Have all prompts answered that the output doesn't hold yet. Raises MedusaError."""
    settings = Settings.load()
    logging.basicConfig(level=settings.log_level, format="%(message)s")
    options.check()
    endpoint = options.endpoint()

    # The model: its vocabulary for both sources, its chat template where it has one.
    file = check_loads(Path(options.base_model_path or settings.model_path))
    chosen = chosen_template(file.metadata, options.chat_template)
    chat, template, max_length = chosen is not None, chosen or ChatTemplate(None), options.length(file.context_length)
    click.echo(f"model   {file.name} ({file.file_type}): {'chats' if chat else 'goes on with texts'}")

    # The prompts: of conversations the users' turns, of texts pieces to go on with.
    records = read_records(options.prompts, options.dataset_split)
    prompts, problems = read_prompts(
        records, chat=chat, lengths=options.prompt_tokens, seed=options.seed, most=options.max_prompts
    )
    for problem in problems[:NAMED]:
        click.echo(f"skipped: {problem}", err=True)
    if problems:
        click.echo(f"records skipped: {len(problems):,}", err=True)
    if not prompts:
        why = f": {problems[0]}" if problems else ", it is empty"
        raise DataError(f"data set {options.prompts}: not one prompt in it{why}")

    # The answers: those that are there stay, the others are written as they come.
    with contextlib.ExitStack() as opened:
        answers = opened.enter_context(AnswerFile(options.output, facts(file), options.identity(file)))
        todo = [prompt for prompt in prompts if prompt.id not in answers.done]
        click.echo(f"prompts {options.prompts or 'standard library'}: {len(prompts):,}, {len(todo):,} to be answered")
        load = LlamaModel(
            file.path, n_gpu_layers=settings.n_gpu_layers, use_mmap=settings.use_mmap, use_mlock=settings.use_mlock
        )
        model = opened.enter_context(contextlib.closing(load))
        bar = opened.enter_context(contextlib.closing(Progress(len(prompts), len(prompts) - len(todo))))
        if endpoint:
            source = from_endpoint(endpoint, options, model, template, todo, bar.tick)
        else:
            source = from_gguf(options, settings, model, template, todo, max_length, bar.tick)
        with contextlib.closing(source):
            for key, outcome in source:
                if isinstance(outcome, Answer):
                    answers.add(outcome)
                bar.end(key, outcome if isinstance(outcome, str) else "")
        bar.close()
        report(options, answers, bar, file)


def from_gguf(
    options: DistillOptions, settings: Settings, model: LlamaModel, template: ChatTemplate, prompts: list[Prompt],
    max_length: int, tick: Tick,
) -> Outcomes:  # fmt: skip
    """Yield the local model's answers: `--parallel` prompts at a time in one context."""
    parallel = min(options.parallel, max(1, len(prompts)))
    if all(prompt.length for prompt in prompts):  # pieces of a known length
        max_length = min(max_length, options.prompt_tokens[1] + 1 + options.max_new_tokens)
    try:
        base = LlamaBase(
            model, n_ctx=parallel * max_length, n_threads=settings.n_threads, n_seq_max=parallel,
            flash_attn=settings.flash_attn, kv_type=settings.kv_type, unified=False,
        )  # fmt: skip
    except ModelFileError:
        raise ModelFileError(
            f"{model.path}: llama.cpp made no cache for {parallel} texts of {max_length} tokens; lower --parallel or "
            "--max_length, or run with LOG_LEVEL=DEBUG to see its reasons"
        ) from None
    encoder = PartEncoder(model)
    dialogues = (Dialogue(prompt, model, encoder, template) for prompt in prompts)
    with base:
        for dialogue in answer_with_base(
            base, dialogues, model.eog, options.sampling, parallel=parallel, max_length=max_length,
            max_new_tokens=options.max_new_tokens, cut_loops=options.loops == "cut", tick=tick,
        ):  # fmt: skip
            temperature = options.sampling(dialogue.prompt, 0).temperature
            yield dialogue.prompt.id, dialogue.problem or dialogue.result(temperature)


def from_endpoint(
    endpoint: Endpoint, options: DistillOptions, model: LlamaModel, template: ChatTemplate, prompts: list[Prompt],
    tick: Tick,
) -> Outcomes:  # fmt: skip
    """Yield an endpoint's answers, with the GGUF's ids for them."""
    encoder, asked = PartEncoder(model), dict[str, Prompt]()

    def exchanges() -> Iterator[Exchange]:
        for prompt in prompts:
            asked[prompt.id] = prompt
            sampling = [options.sampling(prompt, turn) for turn in range(max(1, len(prompt.turns)))]
            text = "" if prompt.turns else opening(prompt, model, encoder)
            yield Exchange(prompt.id, prompt.turns, text, sampling, options.max_new_tokens)

    for exchange in answer_with_endpoint(endpoint, exchanges(), options.concurrency):
        prompt = asked.pop(exchange.id)
        if exchange.problem:
            yield prompt.id, exchange.problem
            continue
        temperature = exchange.sampling[0].temperature
        try:
            answer = answer_of_text(
                prompt, exchange.messages, exchange.reasons, model, encoder, template, temperature,
                cut_loops=options.loops == "cut",
            )  # fmt: skip
        except DataError as error:
            yield prompt.id, str(error)
            continue
        tick(sum(end - start for start, end in answer.spans))
        yield prompt.id, answer


def facts(file: GGUFFile) -> dict[str, Any]:
    """Return what every line says of the model: training takes its ids for models of the same vocabulary alone."""
    return {
        "base_name": file.name, "base_fingerprint": file.file_fingerprint(),
        "heads_fingerprint": file.heads_fingerprint(),
    }  # fmt: skip


def report(options: DistillOptions, answers: AnswerFile, bar: Progress, file: GGUFFile) -> None:
    """Say what there is now, and what to type next. Raises DataError where there is nothing."""
    if not answers.done:
        raise DataError(f"not one of {bar.failed} prompts was answered")
    failed = f"; {bar.failed} prompts without an answer: the same command tries them again" if bar.failed else ""
    click.echo(f"done    {len(answers.done):,} answers, now {bar.tokens:,} tokens, {bar.rate:,.0f} a second{failed}")
    for temperature, tally in sorted(answers.by_temperature.items()):
        click.echo(
            f"        temperature {temperature:g}: {tally.answers:,} answers, {tally.tokens:,} tokens, "
            f"{tally.share_repeated:.0%} of the 8-grams repeated, {tally.loops:,} cut where they began to loop"
        )
    script = script_command(ROOT / "model" / "train_medusa.py")
    paths = f"--base_model_path {shlex.quote(str(file.path))} --dataset_name {shlex.quote(str(options.output))}"
    click.echo(f"now     train heads on them, with\n  {script} {paths}")


def _click_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command()
@_click_options
def main(**values: Any) -> None:
    """Let the base model answer prompts: text for heads to learn from."""
    distill(DistillOptions(**values))


def run() -> None:
    """Run the command."""
    again = f"{script_command(Path(__file__))} {shlex.join(sys.argv[1:])}"
    run_command(main, f"stopped; finished answers are kept, and the same command goes on:\n  {again}")


if __name__ == "__main__":
    run()
