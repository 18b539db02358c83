"""Options and steps that several commands share: settings, the model, decoders.

Knows no command.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from config import Settings
from model.base.chat import CHOICES, ChatTemplate, chosen_template
from model.decoding.decoder import Decoder
from model.decoding.drafters.sources import SOURCE_ALIASES, SOURCES, parse_sources
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.engine import Engine
from model.loaded_model import LoadedModel, LoadOptions
from model.planning.choice import DraftOptions, choose, trial_requests
from model.planning.prompt_files import PYTHON, TASKS, Task, in_turn, read_tasks


def set_logging(settings: Settings) -> None:
    """Log as much as LOG_LEVEL says."""
    logging.basicConfig(level=settings.log_level, format="%(message)s")


def load_options(settings: Settings) -> LoadOptions:
    """Return how the environment wants the model to be loaded."""
    return LoadOptions(
        n_threads=settings.n_threads,
        context_size=settings.model_context_size,
        n_gpu_layers=settings.n_gpu_layers,
        use_mmap=settings.use_mmap,
        use_mlock=settings.use_mlock,
        flash_attn=settings.flash_attn,
        kv_type=settings.kv_type,
        k_heads=settings.medusa_k_heads,
        max_nodes=settings.medusa_max_tokens_per_step,
        prompt_cache_mb=settings.prompt_cache_mb,
        draft_memory_mb=settings.draft_memory_mb,
        share_draft_memory=settings.share_draft_memory,
    )


def load_model(settings: Settings, heads_path: Path | None = None) -> LoadedModel:
    """Load the model that the environment names, with its heads or those named here."""
    set_logging(settings)
    return LoadedModel(
        settings.model_path,
        load_options(settings),
        heads_path=heads_path or settings.medusa_weights_path,
    )


def draft_options(
    *,
    tree_text: str = "auto",
    draft: str = "auto",
    policy: str = "adaptive",
    draft_vocab: int | None = None,
) -> DraftOptions:
    """Return what the command line asks for; see `drafting_options` for the values."""
    return DraftOptions(
        sources=parse_sources(draft),
        tree="" if tree_text == "auto" else tree_text,
        fixed=policy == "fixed",
        draft_vocab=draft_vocab,
    )


def say_if_none(loaded: LoadedModel, template: ChatTemplate | None, choice: str) -> None:
    """Tell the user where prompts are texts to go on with although nobody asked for that."""
    if template is not None or choice != "auto":
        return
    other = f"--chat_template {'|'.join(CHOICES[1:])}|FILE"
    click.echo(
        f"{loaded.file.name} has no chat template: it goes on with the text ({other})", err=True
    )


def read_prompts(
    loaded: LoadedModel, path: Path | None, choice: str, n: int
) -> tuple[list[Task], ChatTemplate | None]:
    """Return n prompts, of each kind in turn, and the chat template that `choice` means for them.

    path: of the prompts; None: the project's own that fit the model. Raises DataError, UsageError.
    """
    template = chosen_template(loaded.file.metadata, choice)
    if path is None:
        path = PYTHON if template is None else TASKS
    tasks = in_turn(read_tasks(path))[:n]
    say_if_none(loaded, template, choice)
    return tasks, template


def make_requests(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    template: ChatTemplate | None,
    max_tokens: int,
    sampling: SamplingParams,
) -> list[Request]:
    """Return a request for each task, each with a seed of its own."""
    return [
        loaded.request(task.text, max_tokens, replace(sampling, seed=i), template=template)
        for i, task in enumerate(tasks)
    ]


def say_measuring() -> None:
    """Tell the user why the first use takes longer."""
    once = "once for this model on this machine"
    click.echo(f"measuring step times and acceptance rates, {once} ...", err=True)


def open_engine(chat_template: str = "auto", **drafting: Any) -> Engine:
    """Load the model that the environment names; drafting: as `draft_options` takes it."""
    settings = Settings.load()
    set_logging(settings)
    return Engine(
        settings.model_path,
        heads_path=settings.medusa_weights_path,
        chat_template=chat_template,
        load=load_options(settings),
        draft=draft_options(**drafting),
        on_measure=say_measuring,
    )


def open_decoder(
    loaded: LoadedModel, sampling: SamplingParams, template: ChatTemplate | None, **drafting: Any
) -> Decoder:
    """Make the decoder that the options ask for; drafting: as `draft_options` takes it."""
    chosen = choose(
        loaded,
        draft_options(**drafting),
        trial_requests(loaded, sampling, template),
        on_measure=say_measuring,
    )
    return loaded.decoder(chosen.policy, chosen.drafters)


drafting_options = [
    click.option(
        "--max_tokens", default=256, type=click.IntRange(1), help="Most new tokens per prompt."
    ),
    click.option("--temperature", default=0.0, help="Sampling temperature; 0: greedy."),
    click.option(
        "--tree",
        "tree_text",
        default="auto",
        help="Draft tree of the heads: a chain's length (4), widths by depth (2,2,1), or a JSON "
        "file of rank paths; auto: the fastest as measured on this machine, possibly no tree.",
    ),
    click.option(
        "--draft",
        type=click.Choice([*SOURCES, *SOURCE_ALIASES]),
        default="auto",
        help="Where draft tokens come from; auto: all there are; free: what needs no heads; both: "
        "heads and n-grams. medusa: old name of heads.",
    ),
    click.option(
        "--policy",
        "--plan",
        "policy",
        type=click.Choice(["adaptive", "fixed", "live"]),
        default="adaptive",
        help="Draft policy for --tree auto; adaptive: draft what is fastest now; fixed: the same "
        "tree in every step, so that runs can be repeated. Old names: --plan; live for adaptive.",
    ),
    click.option(
        "--draft_vocab",
        type=click.IntRange(0),
        help="Heads draft only the N most frequent tokens of their training text; 0: all tokens.  "
        "[default: as many as make up 99.9% of the text]",
    ),
]

prompts_option = click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="File of prompts: a line each (.txt), or objects (.jsonl, .json) as the project's own, "
    "MT-bench's, Spec-Bench's or ShareGPT's.  [default: tasks of six kinds; Python code for a "
    "model without a chat template]",
)
template_option = click.option(
    "--chat_template",
    default="auto",
    metavar="[" + "|".join(CHOICES) + "|FILE]",
    help="auto: the GGUF's own. none, or a GGUF without one: prompts are texts to go on with. FILE "
    "holds a Jinja template.",
)


sampling_options = [
    click.option(
        "--top_p", default=1.0, help="Sample from the likeliest tokens that make up this share."
    ),
    click.option("--top_k", default=0, help="Sample from the N likeliest tokens; 0: all."),
    click.option("--seed", default=0, help="The same seed draws the same tokens."),
]


def with_drafting(command: Any) -> Any:
    """Add the options of length, temperature and drafting to a command."""
    return _with(drafting_options, command)


def with_sampling(command: Any) -> Any:
    """Add the other options of sampling to a command."""
    return _with(sampling_options, command)


def _with(options: list[Any], command: Any) -> Any:
    for option in reversed(options):
        command = option(command)
    return command
