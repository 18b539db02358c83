"""The command bench: how much faster drafted decoding is than plain decoding, by kind of task.

Knows options and messages; what is measured is in model/evaluation/speed.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.common import (
    load_model,
    make_requests,
    open_decoder,
    prompts_option,
    read_prompts,
    template_option,
    with_drafting,
)
from config import Settings
from model.decoding.decoder import Decoder
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.evaluation.report import (
    check_writable,
    chrome_trace,
    facts,
    reliability,
    stages,
    write_json,
)

SHOWN_DIVERGENCES = 3  # the others are in the file of figures


@click.command()
@prompts_option
@template_option
@with_drafting
@click.option(
    "--n_prompts",
    default=24,
    type=click.IntRange(1),
    help="Use only so many prompts, of each kind in turn.",
)
@click.option(
    "--runs",
    default=3,
    type=click.IntRange(1),
    help="How often each prompt is generated, plain and drafted.",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures to this file."
)
@click.option(
    "--png", default="bench.png", type=click.Path(path_type=Path), help="Draw the figures here."
)
@click.option("--profile", is_flag=True, help="Show the time of a drafted step, stage by stage.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Write the steps of the first prompt to this file, for chrome://tracing.",
)
def bench(
    prompts: Path | None,
    chat_template: str,
    n_prompts: int,
    max_tokens: int,
    temperature: float,
    runs: int,
    json_path: Path | None,
    png: Path,
    profile: bool,
    trace: Path | None,
    **drafting: Any,
) -> None:
    """Compare the speed of drafted and plain decoding: same prompts, one process, in turn."""
    from model.evaluation.speed import compare
    from model.evaluation.speed_report import draw, rows_of, table

    for path in (json_path, png, trace):
        check_writable(path)
    loaded = load_model(Settings.load())
    tasks, template = read_prompts(loaded, prompts, chat_template, n_prompts)
    sampling = SamplingParams(temperature=temperature)
    requests = make_requests(loaded, tasks, template, max_tokens, sampling)

    # Measure, with a last run for the trace.
    with open_decoder(loaded, sampling, template, **drafting) as decoder:
        how = f"up to {max_tokens} tokens, plain and drafted in turn"
        click.echo(f"{len(tasks)} prompts, {runs} times each, {how} ...", err=True)
        kinds = [task.kind for task in tasks]
        [result] = compare(loaded, requests, decoder, runs=runs, kinds=kinds)
        if trace:
            write_json(trace, traced(decoder, requests[0]))

    # Report.
    del result["text_pairs"]
    result |= {"temperature": temperature, "max_tokens": max_tokens, "runs": runs, **drafting}
    result["chat_template"] = chat_template
    rows = rows_of(result)
    title = f"{loaded.file.name} ({loaded.file.file_type}), {loaded.options.n_threads} threads"
    title += f", temperature {temperature:g}"
    click.echo(title)
    click.echo(table(rows))
    outside = result["outside_draft_vocab"]
    if outside:
        click.echo(f"{outside:.2%} of the tokens are not in the heads' draft vocabulary")
    if profile:
        click.echo(stages(result))
        click.echo(reliability(result))
    for line in describe_divergences(result["divergences"]):
        click.echo(line)
    draw(png, rows, title)
    click.echo(f"picture: {png}")
    if json_path:
        write_json(json_path, {**facts(loaded), **result})


def traced(decoder: Decoder, request: Request) -> dict[str, Any]:
    """Generate a request; return its steps for chrome://tracing."""
    sequence = decoder.start(request)
    timeline: list[tuple[float, ...]] = []
    sequence.statistics.timeline = timeline
    for _ in decoder.stream(sequence):
        pass
    return chrome_trace(timeline)


def describe_divergences(divergences: list[dict[str, Any]]) -> list[str]:
    """Say where drafted outputs differ from plain decoding's, and how near the two tokens are."""
    lines = []
    for divergence in divergences[:SHOWN_DIVERGENCES]:
        how = "one of the two outputs ends there"
        if divergence["margin"] is not None:
            how = f"the two tokens' logits are {divergence['margin']:.4f} apart"
        where = f"prompt {divergence['prompt']} differs from plain decoding at token"
        lines.append(f"{where} {divergence['position']}: {how}")
    more = len(divergences) - SHOWN_DIVERGENCES
    if more > 0:
        lines.append(f"... and {more} more (--json lists all)")
    return lines
