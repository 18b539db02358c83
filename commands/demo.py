"""The command demo: train heads for the bundled model, then compare drafted and plain decoding."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from commands.common import load_model, open_decoder
from config import Settings
from model.decoding.sampling import SamplingParams
from model.errors import MedusaError
from model.evaluation.report import table
from model.heads.known_heads import HEADS_FOLDER
from model.loaded_model import LoadedModel
from model.planning.prompt_files import PYTHON, read_prompt_file

DEMO_TOKENS_PER_MINUTE = 70_000  # states once and three epochs, on two cores


@click.command()
@click.option("--minutes", default=5.0, type=click.FloatRange(0.1), help="About how long to train.")
@click.option(
    "--max_tokens", default=160, type=click.IntRange(1), help="Most new tokens per prompt."
)
@click.option(
    "--n_prompts",
    default=12,
    type=click.IntRange(1),
    help="How many held-out prompts are continued.",
)
@click.option("--keep", is_flag=True, help="Keep the model of part 3 (0.7 GB, below build/).")
def demo(minutes: float, max_tokens: int, n_prompts: int, keep: bool) -> None:
    """Train heads for the bundled model from scratch and measure their speedup."""
    from model.train_medusa import train
    from model.training.options import TrainOptions

    settings = Settings.load()
    output = HEADS_FOLDER / "demo"

    # 1. Training.
    how_long = f"{minutes:g} min on two idle cores"
    click.echo(f"1. Training four heads for {settings.model_path.name}, about {how_long}")
    result = train(
        TrainOptions(
            base_model_path=str(settings.model_path),
            k_heads=4,
            max_tokens=int(minutes * DEMO_TOKENS_PER_MINUTE),
            max_length=512,
            batch_size=8,
            epochs=3,
            learning_rate=2e-3,
            output_dir=str(output),
        ),
        overwrite=True,
    )
    if result.interrupted:
        click.echo("stopped; `make demo` starts anew")
        sys.exit(130)

    # 2. The comparison.
    click.echo(f"\n2. Plain and drafted decoding, in turn, on {n_prompts} held-out prompts")
    loaded = load_model(settings, result.best)
    texts = read_prompt_file(PYTHON)[:n_prompts]
    results = in_turn(loaded, texts, max_tokens)
    click.echo("\n" + table(results))
    show_first_output(texts[0], *results[0]["text_pairs"][0])
    click.echo(
        "\nA model this small fits into the processor's cache, where verifying 4 tokens costs\n"
        "twice as much as one: little can be gained. Large models wait for memory, so that\n"
        "4 tokens cost little more than one: they gain more."
    )
    loaded.close()

    # 3. The same at the cost of a large model.
    at_real_cost(settings, result.best, texts[: n_prompts // 2 or 1], max_tokens, keep)
    click.echo(
        f"\nCurves: {os.path.relpath(output / 'training.png')}\n"
        "For a GGUF of your own:\n"
        "  .venv/bin/python model/train_medusa.py \\\n"
        "    --base_model_path YOURS.gguf --dataset_name YOUR_CHATS.jsonl\n"
        '  MODEL_PATH=YOURS.gguf .venv/bin/python main.py generate "Once upon a time" --stream'
    )


def show_first_output(prompt: str, plain: str, drafted: str) -> None:
    """Print the last line of a prompt and its drafted output."""
    same = "the same plain and drafted"
    if plain != drafted:
        same = "drafted; plain decoding's differs after a near-tie"
    click.echo(f"\nThe first output, {same}:\n")
    click.echo("   " + prompt.rstrip().replace("\n", "\n   ").splitlines()[-1])
    click.echo("   " + drafted.rstrip().replace("\n", "\n   "))


def in_turn(
    loaded: LoadedModel, texts: list[str], max_tokens: int, runs: int = 3
) -> list[dict[str, Any]]:
    """Continue all prompts plain and drafted, at two temperatures; return the figures of each."""
    from model.evaluation.speed import compare

    results = []
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(temperature=temperature)
        requests = [
            loaded.request(text, max_tokens, replace(sampling, seed=i))
            for i, text in enumerate(texts)
        ]
        with open_decoder(loaded, sampling, draft="both") as decoder:
            [result] = compare(loaded, requests, decoder, runs=runs)
        results.append({"temperature": temperature, **result})
    return results


def at_real_cost(
    settings: Settings, heads: Path, texts: list[str], max_tokens: int, keep: bool
) -> None:
    """Compare on a model with the same output at the cost of 1 B parameters, then remove it."""
    from model.evaluation.scaled_model import OUT, build

    click.echo(
        f"\n3. The same on {len(texts)} prompts at the cost of 1 B parameters, some minutes:\n"
        "   the bundled model, padded with weights that do not change its output"
    )
    try:
        scaled = build("1b", "Q4_0", base=settings.model_path, heads=heads, out=OUT / "demo")
    except MedusaError as error:  # such as too little disk room; parts 1 and 2 were shown
        click.echo(f"   skipped: {error}")
        return
    try:
        loaded = load_model(settings.model_copy(update={"model_path": scaled.model}), scaled.heads)
        click.echo("\n" + table(in_turn(loaded, texts, max_tokens, runs=1)))
        loaded.close()
    finally:
        if not keep:
            scaled.model.unlink()
            assert scaled.heads is not None
            shutil.rmtree(scaled.heads)
