"""The command demo: train heads for the bundled model, then ask a chat model, drafted and plain."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import click

from commands.common import load_model, make_requests, open_decoder, say_if_none
from config import Settings
from model.base.chat import ChatTemplate, chosen_template
from model.base.known_models import BUNDLED
from model.decoding.sampling import SamplingParams
from model.evaluation.speed_report import rows_of, table
from model.heads.known_heads import HEADS_FOLDER
from model.loaded_model import LoadedModel
from model.planning.auto_tuning import tuned
from model.planning.choice import trial_requests
from model.planning.prompt_files import PYTHON, TASKS, Task, in_turn, read_tasks
from model.trees.slices import finish

TOKENS_PER_MINUTE = 35_000  # whose states take about a quarter of the time on two cores
KINDS = ("chat", "code", "summary", "rewriting")
WIDTH = 96  # characters of a line of a question or an answer
NEXT = """\
What to type next:
  .venv/bin/python main.py                 a page to chat on, and OpenAI's API
  .venv/bin/python main.py chat            the same in the terminal; accepted draft tokens are green
  .venv/bin/python main.py generate "Why is the sky blue?" --stream
  .venv/bin/python main.py bench           all six kinds of tasks, and a picture
For a GGUF of your own:
  .venv/bin/python model/train_medusa.py --base_model_path YOURS.gguf --hours 1
  MODEL_PATH=YOURS.gguf .venv/bin/python main.py"""


@click.command()
@click.option("--minutes", default=4.0, type=click.FloatRange(0.1), help="About how long to train.")
@click.option(
    "--max_tokens", default=128, type=click.IntRange(1), help="Most new tokens per prompt."
)
@click.option(
    "--n_prompts",
    default=12,
    type=click.IntRange(1),
    help="How many held-out prompts each model is given.",
)
def demo(minutes: float, max_tokens: int, n_prompts: int) -> None:
    """Train heads for the bundled model from scratch, then compare plain and drafted decoding."""
    settings = Settings.load()

    # 1. Training.
    click.echo(
        f"1. Training four heads for {BUNDLED.name}, about {minutes:g} min on two idle cores"
    )
    output = HEADS_FOLDER / "demo"
    heads = trained(minutes, output)

    # 2. The bundled model, which goes on with Python.
    click.echo(f"\n2. Plain and drafted decoding, in turn: {BUNDLED.name} goes on with Python")
    tiny = load_model(settings.model_copy(update={"model_path": BUNDLED}), heads)
    compared(tiny, in_turn(read_tasks(PYTHON))[:n_prompts], None, max_tokens)
    click.echo(f"curves of the training: {os.path.relpath(output / 'training.png')}")
    tiny.close()

    # 3. A chat model, which does what people ask of one.
    if settings.model_path.resolve() == BUNDLED:
        why = "no chat model is installed; `make setup` fetches one, SmolLM2 (98 MB)"
        if "model_path" in settings.model_fields_set:
            why = f"MODEL_PATH names {BUNDLED.name}, which is no chat model"
        click.echo(f"\n3. Skipped: {why}")
    else:
        loaded = load_model(settings)
        template = chosen_template(loaded.file.metadata, "auto")
        say_if_none(loaded, template, "auto")
        kind = "a chat model" if template else "a model of yours"
        click.echo(f"\n3. The same with {kind}: {loaded.file.name} does four kinds of tasks")
        tasks = [task for task in read_tasks(TASKS) if task.kind in KINDS]
        result = compared(loaded, in_turn(tasks)[:n_prompts], template, max_tokens)
        if loaded.base_model.can_roll_back:
            click.echo("\n" + what_pays(loaded, template, result))
        loaded.close()
    click.echo(f"\n{NEXT}")


def trained(minutes: float, output: Path) -> Path:
    """Train heads for the bundled model; return the folder of the best ones."""
    from model.train_medusa import train
    from model.training.options import TrainOptions

    options = TrainOptions(
        base_model_path=str(BUNDLED),
        k_heads=4,
        max_tokens=int(minutes * TOKENS_PER_MINUTE),
        max_length=512,
        learning_rate=2e-3,
        output_dir=str(output),
    )
    result = train(options, overwrite=True, until=time.monotonic() + 60 * minutes)
    if result.interrupted:
        click.echo("stopped; `make demo` starts anew")
        sys.exit(130)
    return result.best


def compared(
    loaded: LoadedModel, tasks: Sequence[Task], template: ChatTemplate | None, max_tokens: int
) -> dict[str, Any]:
    """Generate plain and drafted, in turn; show the first output of each kind, and the table."""
    from model.evaluation.speed import compare

    requests = make_requests(loaded, tasks, template, max_tokens, SamplingParams())
    kinds = [task.kind for task in tasks]
    with open_decoder(loaded, SamplingParams(), template) as decoder:
        [result] = compare(loaded, requests, decoder, runs=2, kinds=kinds)
    for kind in dict.fromkeys(kinds):
        first = kinds.index(kind)
        _, drafted = result["text_pairs"][first]
        show(tasks[first], drafted, chat=template is not None)
    click.echo("\n" + table(rows_of(result)))
    return result


def show(task: Task, answer: str, *, chat: bool) -> None:
    """Print the beginning of a chat's question and answer, or a text's last lines and more."""
    lines = [line.rstrip()[:WIDTH] for line in answer.splitlines() if line.strip()]
    if chat:
        asked = f"{task.kind}: {shorten(task.text, WIDTH, placeholder=' ...')}"
    else:
        asked = task.text.rstrip().splitlines()[-1]
    click.echo("\n  " + click.style(asked, bold=True))
    for line in lines[:3]:
        click.echo(f"  {line}")


def what_pays(loaded: LoadedModel, template: ChatTemplate | None, result: dict[str, Any]) -> str:
    """Say what drafts bring on this machine, and what they would where steps cost something else.

    result: of `compare`, at temperature 0.
    """
    # Remembered: the comparison has measured it.
    trial = trial_requests(loaded, SamplingParams(), template)
    tuning = finish(tuned(loaded, trial, heads=loaded.heads_path is not None))
    curve = tuning.curve
    four = curve.ratio(4, curve.contexts[0])
    by_kind = rows_of(result)
    best = max(by_kind, key=lambda kind: by_kind[kind]["acceptance_length"])
    longest = by_kind[best]["acceptance_length"]
    drafters = "heads, n-grams and recycled continuations draft"
    if loaded.heads_path is None:
        drafters = "n-grams and recycled continuations draft, as this model has no heads yet"
    return (
        f"Here {drafters}. On this machine a step that verifies 4 tokens takes {four:.1f} times\n"
        "as long as a step of one, so a draft is made only where it is likely to be right, and\n"
        f"nothing is drafted where that does not pay: {result['speedup']:.2f}x overall. Where "
        "steps wait for memory\n"
        "(GPUs, many cores, larger models) 4 tokens cost little more than one. There the speedup\n"
        f"comes near the tokens per step: the same drafts bring {result['acceptance_length']:.2f} "
        f"overall and {longest:.2f} for {best}."
    )
