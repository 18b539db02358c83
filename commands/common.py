"""What several commands share: the model that the environment names, prompts, options, decoders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from config import HEADS_FOLDER, ROOT, Settings
from model.decoding.generation import Request
from model.decoding.planning import Draft
from model.decoding.sampling import SamplingParams
from model.engine import Decoder, Engine, EngineOptions
from model.measuring.choosing import Wish, choose, trial_requests
from model.measuring.report import read_prompts

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


def trial(engine: Engine, sampling: SamplingParams) -> list[Request]:
    """Return the requests that drafts are timed on."""
    return trial_requests(engine, read_prompts(PROMPTS / "trial.jsonl"), sampling)


def open_decoder(
    engine: Engine,
    sampling: SamplingParams,
    *,
    tree_text: str = "auto",
    draft: Draft = "auto",
    plan: str = "live",
    draft_vocab: int | None = None,
) -> Decoder:
    """Make the decoder that the options ask for, telling of a measurement."""
    wish = Wish(draft, "" if tree_text == "auto" else tree_text, plan == "fixed", draft_vocab)
    chosen = choose(
        engine,
        wish,
        trial(engine, sampling),
        told=lambda: click.echo("measuring what pays here (once for this model, heads and machine) ...", err=True),
    )
    return engine.decoder_for(chosen.plan, chosen.drafter, ngrams=chosen.ngrams)


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
        help="Draft the N most frequent tokens only; 0: all; default: those that make up 99.9% of the training text.",
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
