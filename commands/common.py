"""What several commands share: the model that the environment names, prompts, options, decoders."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from config import HEADS_FOLDER, ROOT, Settings
from model.decoding.generation import Request
from model.decoding.sampling import SamplingParams
from model.engine import Decoder, Engine, EngineOptions
from model.measuring.report import read_prompts
from model.measuring.tuning import BRANCH, Tuning, live_decoder, tuned
from model.trees.tree import Tree

PROMPTS = ROOT / "benchmarks" / "prompts"


def set_logging(settings: Settings) -> None:
    """Log as much as LOG_LEVEL says."""
    logging.basicConfig(level=settings.log_level, format="%(message)s")


def engine_options(settings: Settings) -> EngineOptions:
    """Return how the environment wants the model to be loaded."""
    return EngineOptions(
        settings.n_threads,
        settings.model_context_size,
        settings.n_gpu_layers,
        settings.use_mmap,
        settings.use_mlock,
        settings.flash_attn,
        settings.kv_type,
        settings.medusa_k_heads,
        settings.medusa_max_tokens_per_step,
    )


def open_engine(settings: Settings, weights: Path | None = None) -> Engine:
    """Load the model that the environment names, with its heads or those named here."""
    set_logging(settings)
    return Engine(settings.model_path, engine_options(settings), weights or settings.medusa_weights_path, HEADS_FOLDER)


def tune_engine(engine: Engine, sampling: SamplingParams, draft: str, draft_vocab: int | None) -> Tuning:
    """Return what this machine's steps cost and its guesses win: measured once for model, heads and machine."""
    return tuned(
        engine,
        trial_requests(engine, sampling),
        heads=draft in ("medusa", "both"),
        draft_vocab=draft_vocab,
        told=lambda: click.echo("measuring what pays here (once for this model, heads and machine) ...", err=True),
    )


def open_decoder(
    engine: Engine, sampling: SamplingParams, *, tree_text: str, draft: str, plan: str, draft_vocab: int | None
) -> Decoder:
    """Make the decoder that the options ask for.

    draft "auto": from the text so far and, where the model has heads, with them; a tree that is given is drafted by
    the heads alone. plan "live": what pays now; "fixed": the same tree in every step, so that runs can be repeated.
    """
    if draft == "auto":
        draft = "medusa" if tree_text != "auto" else "both" if engine.weights is not None else "ngram"
    branch = min(BRANCH, engine.options.max_nodes - 1) if draft in ("ngram", "both") else 0
    if draft == "none":
        return engine.decoder()
    if tree_text != "auto":
        tree = engine.check_tree(Tree.parse(tree_text))
        branch = min(branch, engine.options.max_nodes - len(tree))
        return engine.decoder(tree, branch=branch, draft_vocab=draft_vocab)
    tuning = tune_engine(engine, sampling, draft, draft_vocab)
    if plan == "live":
        return live_decoder(engine, tuning, ngrams=branch > 0, draft_vocab=draft_vocab)
    best = tuning.best(tuning.curve.contexts[0], engine.options.max_nodes)
    branch = min(branch, engine.options.max_nodes - len(best.tree))
    return engine.decoder(best.tree, branch=branch, draft_vocab=draft_vocab)


def trial_requests(engine: Engine, sampling: SamplingParams) -> list[Request]:
    """Return the requests that trees are timed on; their prompts fill half of the context at the most."""
    requests = [engine.request(p, 64, sampling=sampling) for p in read_prompts(PROMPTS / "trial.jsonl")]
    return [replace(r, prompt=r.prompt[: engine.context // 2]) for r in requests]


sampling_options = [
    click.option("--max_tokens", default=256, type=click.IntRange(1), help="New tokens at the most."),
    click.option("--temperature", default=0.0, help="0 is greedy."),
    click.option(
        "--tree",
        "tree_text",
        default="auto",
        help="Chain length (4), widths (2,2,1), a JSON file of rank "
        "paths, or auto: what pays on this machine, possibly nothing.",
    ),
    click.option(
        "--draft",
        type=click.Choice(["auto", "medusa", "ngram", "both", "none"]),
        default="auto",
        help="Who drafts: the heads, the text so far, both, nobody; auto: whoever is there.",
    ),
    click.option(
        "--plan",
        type=click.Choice(["live", "fixed"]),
        default="live",
        help="With an auto tree: adapt it while writing, or keep it, so that runs can be repeated.",
    ),
    click.option(
        "--draft_vocab",
        type=click.IntRange(0),
        help="Draft the N most frequent tokens only; 0: all; default: those that make up 99.5% of the training text.",
    ),
]

prompts_option = click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    default=PROMPTS / "python.jsonl",
    help=".jsonl or .txt",
    show_default="held-out Python",
)


def with_sampling(command: Any) -> Any:
    """Add the options that several commands share."""
    for option in reversed(sampling_options):
        command = option(command)
    return command
