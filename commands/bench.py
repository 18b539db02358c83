"""The command bench: how much faster drafted decoding is than plain decoding.

Knows options and messages; what is measured is in model/evaluation/speed.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from commands.common import load_model, open_decoder, prompts_option, with_drafting
from config import Settings
from model.decoding.sampling import SamplingParams
from model.evaluation.report import (
    check_writable,
    chrome_trace,
    facts,
    stages,
    table,
    write_json,
)
from model.planning.prompt_files import read_prompt_file


@click.command()
@prompts_option
@with_drafting
@click.option("--n_prompts", type=click.IntRange(1), help="Use only the first so many prompts.")
@click.option(
    "--runs",
    default=3,
    type=click.IntRange(1),
    help="How often each prompt is generated, plain and drafted.",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures to this file."
)
@click.option("--profile", is_flag=True, help="Show the time of a drafted step, stage by stage.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Write the steps of the first prompt to this file, for chrome://tracing.",
)
def bench(
    prompts: Path,
    n_prompts: int | None,
    max_tokens: int,
    temperature: float,
    runs: int,
    json_path: Path | None,
    profile: bool,
    trace: Path | None,
    **drafting: Any,
) -> None:
    """Compare the speed of drafted and plain decoding: same prompts, one process, in turn."""
    from model.evaluation.speed import compare

    check_writable(json_path)
    check_writable(trace)
    loaded = load_model(Settings.load())
    sampling = SamplingParams(temperature=temperature)
    requests = [
        loaded.request(text, max_tokens, replace(sampling, seed=i))
        for i, text in enumerate(read_prompt_file(prompts)[:n_prompts])
    ]

    # Measure, with a last run for the trace.
    with open_decoder(loaded, sampling, **drafting) as decoder:
        [result] = compare(loaded, requests, decoder, runs=runs)
        if trace:
            sequence = decoder.start(requests[0])
            timeline: list[tuple[float, ...]] = []
            sequence.statistics.timeline = timeline
            for _ in decoder.stream(sequence):
                pass
            write_json(trace, chrome_trace(timeline))

    # Report.
    del result["text_pairs"]
    result |= {"temperature": temperature, "max_tokens": max_tokens, "runs": runs, **drafting}
    click.echo(table([result]))
    outside = result["outside_draft_vocab"]
    if outside:
        click.echo(f"{outside:.2%} of the tokens are not in the heads' draft vocabulary")
    if profile:
        click.echo(stages(result))
    for divergence in result["divergences"]:
        click.echo(describe_divergence(divergence))
    if json_path:
        write_json(json_path, {**facts(loaded), **result})


def describe_divergence(divergence: dict[str, Any]) -> str:
    """Say where a drafted output differs from plain decoding's, and how near the two tokens are."""
    how = "one of the two outputs ends there"
    if divergence["margin"] is not None:
        how = f"the two tokens' logits are {divergence['margin']:.4f} apart"
    where = f"prompt {divergence['prompt']} differs from plain decoding at token"
    return f"{where} {divergence['position']}: {how}"
