"""Plain decoding and drafting in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from commands.common import (
    open_decoder,
    open_engine,
    prompts_option,
    with_sampling,
)
from config import Settings
from model.decoding.sampling import SamplingParams
from model.measuring.report import check_writable, chrome_trace, facts, read_prompts, stages, table, write_json


@click.command()
@prompts_option
@with_sampling
@click.option("--n_prompts", type=click.IntRange(1), help="Only the first so many.")
@click.option("--runs", default=3, type=click.IntRange(1), help="Every prompt so many times each way.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--profile", is_flag=True, help="Show where the time of a step goes.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write the first text's steps for chrome://tracing.")
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
    """Time plain decoding and Medusa in turn, in one process."""
    from model.measuring.speed import compare

    check_writable(json_path)
    check_writable(trace)
    engine = open_engine(Settings.load())
    sampling = SamplingParams(temperature)
    requests = [
        engine.request(p, max_tokens, sampling=replace(sampling, seed=i))
        for i, p in enumerate(read_prompts(prompts)[:n_prompts])
    ]
    with open_decoder(engine, sampling, **drafting) as medusa:
        [result] = compare(engine, requests, medusa, runs=runs)
        if trace:
            generation = medusa.start(requests[0])
            generation.slot.stats.timeline = []
            generation.run()
            write_json(trace, chrome_trace(generation.slot.stats.timeline))
    del result["text_pairs"]
    result |= {"temperature": temperature, "max_tokens": max_tokens, "runs": runs, **drafting}
    click.echo(table([result]))
    if result["outside_draft_vocab"]:
        click.echo(f"{result['outside_draft_vocab']:.2%} of the tokens are not in the heads' draft vocabulary")
    if profile:
        click.echo(stages(result))
    for d in result["divergences"]:
        by = "at its end" if d["margin"] is None else f"by {d['margin']:.4f}"
        click.echo(f"prompt {d['prompt']} parts from the plain text at token {d['position']}, {by}")
    if json_path:
        write_json(json_path, {**facts(engine), **result})
