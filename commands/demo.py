"""The whole way on the bundled model: train, then compare."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from commands.common import PROMPTS, open_decoder, open_engine
from config import HEADS_FOLDER, Settings
from model.decoding.sampling import SamplingParams
from model.engine import Engine
from model.errors import MedusaError
from model.measuring.report import read_prompts, table

DEMO_TOKENS_PER_MINUTE = 70_000  # states once and three epochs, on two cores


@click.command()
@click.option("--minutes", default=5.0, type=click.FloatRange(0.1), help="Roughly how long to train.")
@click.option("--max_tokens", default=160, type=click.IntRange(1), help="New tokens per text.")
@click.option("--n_prompts", default=12, type=click.IntRange(1), help="Held-out prompts to write for.")
@click.option("--keep", is_flag=True, help="Keep the 1 B-cost model (0.7 GB, below build/).")
def demo(minutes: float, max_tokens: int, n_prompts: int, keep: bool) -> None:
    """Train heads for the bundled model from scratch and watch what they bring."""
    from model.train_medusa import train
    from model.training.options import TrainOptions

    settings = Settings.load()
    output = HEADS_FOLDER / "demo"
    click.echo(f"1. Training four heads for {settings.model_path.name}, {minutes:g} min on two idle cores")
    result = train(
        TrainOptions(
            base_model_path=str(settings.model_path),
            k_heads=4,
            max_tokens=int(minutes * DEMO_TOKENS_PER_MINUTE),
            max_length=512,
            learning_rate=2e-3,
            output_dir=str(output),
        ),
        overwrite=True,
    )
    if result.interrupted:
        click.echo("stopped; `make demo` starts afresh")
        sys.exit(130)
    click.echo(f"\n2. Plain decoding and Medusa, in turn, on {n_prompts} held-out prompts")
    engine = open_engine(settings, result.best)
    texts = read_prompts(PROMPTS / "python.jsonl")[:n_prompts]
    results = in_turn(engine, texts, max_tokens)
    click.echo("\n" + table(results))
    plain, medusa = results[0]["text_pairs"][0]
    click.echo(f"\nThe first text, {'the same both ways' if plain == medusa else 'which parts at a near-tie'}:\n")
    click.echo("   " + texts[0].rstrip().replace("\n", "\n   ").splitlines()[-1])
    click.echo("   " + medusa.rstrip().replace("\n", "\n   "))
    click.echo(
        "\nA model this small fits into the processor's cache, where checking 4 tokens costs twice as much as one:\n"
        "little can be won. Large models wait for memory, where 4 tokens cost little more than one: they gain more."
    )
    engine.model.close()
    at_real_cost(settings, result.best, texts[: n_prompts // 2 or 1], max_tokens, keep)
    click.echo(
        f"\nCurves: {os.path.relpath(output / 'training.png')}\n"
        "For a GGUF of your own:\n"
        "  .venv/bin/python model/train_medusa.py --base_model_path YOURS.gguf --dataset_name YOUR_CHATS.jsonl\n"
        '  MODEL_PATH=YOURS.gguf .venv/bin/python main.py generate "Once upon a time" --stream'
    )


def in_turn(engine: Engine, texts: list[str], max_tokens: int, runs: int = 3) -> list[dict[str, Any]]:
    """Write all texts both ways at two temperatures; return the figures of each."""
    from model.measuring.speed import compare

    results = []
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(temperature)
        requests = [engine.request(p, max_tokens, sampling=replace(sampling, seed=i)) for i, p in enumerate(texts)]
        with open_decoder(engine, sampling, draft="both") as medusa:
            [result] = compare(engine, requests, medusa, runs=runs)
        results.append({"temperature": temperature, **result})
    return results


def at_real_cost(settings: Settings, heads: Path, texts: list[str], max_tokens: int, keep: bool) -> None:
    """Compare on a model that writes the same texts at the cost of 1 B parameters; remove it afterwards."""
    from benchmarks.scale_up import OUT, build

    click.echo(
        f"\n3. The same on {len(texts)} prompts at the cost of 1 B parameters: the bundled model, padded with weights\n"
        "   that change nothing of what it writes (benchmarks/scale_up.py); some minutes"
    )
    try:
        scaled = build("1b", "Q4_0", base=settings.model_path, heads=heads, out=OUT / "demo")
    except MedusaError as error:  # no room for it, say; the demo has shown its own part
        click.echo(f"   left out: {error}")
        return
    try:
        engine = open_engine(settings.model_copy(update={"model_path": scaled.model}), scaled.heads)
        click.echo("\n" + table(in_turn(engine, texts, max_tokens, runs=1)))
        engine.model.close()
    finally:
        if not keep:
            scaled.model.unlink()
            assert scaled.heads is not None
            shutil.rmtree(scaled.heads)
