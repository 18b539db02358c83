"""The command tune: step times and acceptance rates on this machine, and the best tree.

Knows options and messages; measuring is model/planning/auto_tuning.py, comparing model/evaluation/.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from commands.common import (
    load_model,
    make_requests,
    prompts_option,
    read_prompts,
    template_option,
)
from config import Settings
from model.base.chat import ChatTemplate
from model.decoding.decoder import Decoder
from model.decoding.drafters.sources import FREE
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.evaluation.report import check_writable
from model.loaded_model import LoadedModel
from model.planning.auto_tuning import Tuning, adaptive_decoder, tuned
from model.planning.choice import trial_requests
from model.planning.flash_attention import choose_flash_attention
from model.trees.slices import finish
from model.trees.tree import Tree

BUDGET_S = 3.0  # for each of steps, drafting and acceptance
N_TRIALS = 18  # prompts that acceptance is measured on: three of each kind


@click.command()
@prompts_option
@template_option
@click.option("--temperature", default=0.0, help="Sampling temperature; 0: greedy.")
@click.option("--draft_vocab", type=click.IntRange(0), help="As for generate and bench.")
@click.option(
    "--max_tokens",
    default=96,
    type=click.IntRange(16),
    help="Most new tokens per prompt, when the best tree is tried.",
)
@click.option(
    "--n_prompts",
    default=6,
    type=click.IntRange(1),
    help="Use only so many prompts, of each kind in turn.",
)
@click.option(
    "--png", default="tune.png", type=click.Path(path_type=Path), help="Draw the figures here."
)
@click.option(
    "--types",
    help="Also compare other types of the file, such as q4_0,q4_0+q4_0,bf16 (file+LM head).",
)
@click.option(
    "--full",
    is_flag=True,
    help="With --types: time whole copies (in TMPDIR), not copies of some layers.",
)
def tune(
    prompts: Path | None,
    chat_template: str,
    temperature: float,
    draft_vocab: int | None,
    max_tokens: int,
    n_prompts: int,
    png: Path,
    types: str | None,
    full: bool,
) -> None:
    """Measure steps and drafts on this machine, find the best draft tree, and try it."""
    from model.evaluation.quantizations import parse_types
    from model.evaluation.tuning_report import draw, table

    check_writable(png)
    names = parse_types(types) if types is not None else []
    loaded = load_model(Settings.load())
    tasks, template = read_prompts(loaded, prompts, chat_template, n_prompts)
    sampling = SamplingParams(temperature=temperature)

    # Measure, and search the best tree.
    tuning = measured(loaded, sampling, template, draft_vocab)
    context = tuning.curve.contexts[0]
    choices = tuning.choices(context, loaded.options.max_nodes)
    best = tuning.best(context, loaded.options.max_nodes)
    click.echo(f"{loaded.file.name} ({loaded.file.file_type}), {loaded.options.n_threads} threads")
    click.echo(table(tuning, choices, best))

    # Try it: predictions are one thing, prompts another.
    requests = make_requests(loaded, tasks, template, max_tokens, sampling)
    for name, result in tried(loaded, tuning, best.tree, requests, draft_vocab).items():
        click.echo(
            f"measured on {len(requests)} prompts, {name}: {result['speedup']:.2f}x, "
            f"acceptance length {result['acceptance_length']:.2f}, "
            f"{result['tree_nodes'] - 1:.1f} nodes drafted a step"
        )
    draw(png, tuning, choices, best)
    click.echo(f"picture: {png}")

    # Other types.
    if names:
        click.echo(compared_types(loaded, tuning, names, full=full))


def measured(
    loaded: LoadedModel,
    sampling: SamplingParams,
    template: ChatTemplate | None,
    draft_vocab: int | None,
) -> Tuning:
    """Return what was measured just now, with the heads if there are any."""
    heads = loaded.heads_path is not None
    if not heads:
        click.echo(
            f"no heads for {loaded.file.name}: only n-grams and recycled continuations can draft",
            err=True,
        )
    finish(choose_flash_attention(loaded, afresh=True))
    slices = tuned(
        loaded,
        trial_requests(loaded, sampling, template, N_TRIALS),
        heads=heads,
        draft_vocab=draft_vocab,
        afresh=True,
        budget_s=BUDGET_S,
    )
    return finish(slices)


def tried(
    loaded: LoadedModel,
    tuning: Tuning,
    tree: Tree,
    requests: Sequence[Request],
    draft_vocab: int | None,
) -> dict[str, dict[str, Any]]:
    """Return the figures of the adaptive policy and, if it drafts, of the tree in every step."""
    from model.evaluation.speed import compare

    decoders = dict[str, Decoder]()
    with ExitStack() as stack:
        adaptive = adaptive_decoder(loaded, tuning, FREE, draft_vocab=draft_vocab)
        decoders["adaptive policy"] = stack.enter_context(adaptive)
        if len(tree) > 1:
            fixed = loaded.fixed_decoder(tree, draft_vocab=draft_vocab)
            decoders["best tree in every step"] = stack.enter_context(fixed)
        results = compare(loaded, requests, *decoders.values(), runs=1)
    return dict(zip(decoders, results, strict=True))


def compared_types(loaded: LoadedModel, tuning: Tuning, names: list[str], *, full: bool) -> str:
    """Return the table of types, having timed each."""
    from model.evaluation.quantizations import compare_types, table

    rows = compare_types(
        loaded,
        tuning,
        names,
        full=full,
        on_timing=lambda what: click.echo(f"timing {what} ...", err=True),
    )
    return table(rows)
