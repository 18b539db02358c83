"""Options of distilling: names, defaults and meanings in one place, and what follows from them.

Knows nothing of how answers come about.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from model.base.chat import CHOICES
from model.base.gguf_file import GGUFFile
from model.base.llama import MAX_SEQUENCES
from model.decoding.sampling import SamplingParams
from model.errors import UsageError
from model.training.data.prompts import Prompt
from model.training.distillation.dialogue import LEAST_ROOM, prompt_seed
from model.training.distillation.endpoint import Endpoint
from model.training.distillation.question_writer import QuestionStyle

LONGEST = 1024  # tokens of prompt and answers, where nothing is said
OWN_QUESTIONS = 1000  # where a chat model asks itself and nothing is said
FREE_TO_CHANGE = {
    "base_model_path",
    "prompts",
    "output",
    "max_prompts",
    "parallel",
    "api_key_env",
    "concurrency",
    "timeout",
}


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{value!r}: numbers with commas between them, such as 0.0,0.7"
        ) from None


def _lengths(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    first, _, second = value.partition("-")
    with contextlib.suppress(ValueError):
        least = int(first)
        most = int(second or first)
        if 1 <= least <= most:
            return least, most
    raise click.BadParameter(
        f"{value!r}: one length, or the shortest and the longest, such as 64-128"
    )


def _option(
    name: str, default: Any, meaning: str, kind: Any = None, **more: Any
) -> Callable[[Any], Any]:
    return click.option(
        f"--{name}", default=default, show_default=default != "", help=meaning, type=kind, **more
    )


_SOME = click.IntRange(min=1)
_ANY = click.IntRange(min=0)
_SECONDS = click.FloatRange(min=0, min_open=True)
OPTIONS = (
    _option(
        "base_model_path", "",
        "The GGUF file of the base model; with --url, its vocabulary makes the ids.",
    ),
    _option(
        "prompts", "",
        "Hugging Face data set, .txt, .jsonl, .json, .parquet or folder; none: a chat model asks "
        "itself, others go on with the demo's text.",
    ),
    _option("dataset_split", "train", "Split of a Hugging Face data set, such as train[:10%]."),
    click.option(
        "--output", required=True, type=click.Path(path_type=Path),
        help="File that answers are appended to, .jsonl.",
    ),
    _option("max_new_tokens", 512, "Most tokens of an answer.", _SOME),
    _option(
        "temperature", "0.0,0.7", "Temperatures that prompts use in turn; 0 is greedy.",
        callback=_numbers,
    ),
    _option("top_p", 1.0, "Sample from the likeliest tokens that make up this share.", float),
    _option("seed", 0, "Seed of sampling, and of where pieces of texts are cut.", _ANY),
    _option(
        "max_prompts", 0, "Answer only so many prompts; 0: all, or 1,000 of the model's own.", _ANY
    ),
    _option("language", "English", "Language of the questions that a chat model asks itself."),
    _option(
        "question_temperature", "0.7,1.0", "Temperatures that such questions use in turn.",
        callback=_numbers,
    ),
    _option("question_tokens", 192, "Longer ones are dropped.", _SOME),
    _option(
        "max_length", 0,
        "Most tokens of prompt and answers; 0: 1,024, or the model's context if shorter.", _ANY,
    ),
    _option(
        "prompt_tokens", "64-128",
        "Tokens of the pieces of texts that are to be continued, shortest-longest.",
        callback=_lengths,
    ),
    _option(
        "chat_template", "auto",
        "auto: the GGUF's own; none, or a GGUF without one: prompts are texts to continue.",
        click.Choice(CHOICES),
    ),
    _option(
        "loops", "cut", "cut: an answer ends where it only repeats itself.",
        click.Choice(["cut", "keep"]),
    ),
    _option(
        "parallel", 0,
        "Prompts that the GGUF answers at once; 0: as many as are fastest here, measured once.",
        click.IntRange(0, MAX_SEQUENCES),
    ),
    _option(
        "url", "",
        "Let this OpenAI-compatible endpoint answer, such as http://localhost:8000/v1.",
    ),
    _option("model", "", "The endpoint's name for the model."),
    _option("api_key_env", "", "Environment variable that holds the endpoint's key."),
    _option("concurrency", 8, "Prompts that the endpoint answers at once.", _SOME),
    _option("timeout", 120.0, "Seconds that the endpoint may need for an answer.", _SECONDS),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """All options of `distill.py`; OPTIONS has the meanings."""

    base_model_path: str
    prompts: str
    dataset_split: str
    output: Path
    max_new_tokens: int
    temperature: tuple[float, ...]
    top_p: float
    seed: int
    max_prompts: int
    language: str
    question_temperature: tuple[float, ...]
    question_tokens: int
    max_length: int
    prompt_tokens: tuple[int, int]
    chat_template: str
    loops: str
    parallel: int
    url: str
    model: str
    api_key_env: str
    concurrency: int
    timeout: float

    def sampling(self, prompt: Prompt, turn: int) -> SamplingParams:
        """Return how one answer is sampled: temperatures take turns, seeds belong to prompts."""
        temperature = self.temperature[prompt.number % len(self.temperature)]
        seed = prompt_seed(self.seed, prompt.id, turn)
        return SamplingParams(temperature=temperature, top_p=self.top_p, seed=seed)

    def question_style(self) -> QuestionStyle:
        """Return how a chat model is to ask itself."""
        return QuestionStyle(
            language=self.language,
            temperatures=self.question_temperature,
            longest=self.question_tokens,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raise UsageError for temperatures and shares that cannot be sampled with."""
        for temperature in (*self.temperature, *self.question_temperature):
            SamplingParams(temperature=temperature, top_p=self.top_p)

    def endpoint(self) -> Endpoint | None:
        """Return the endpoint that is to answer, if any.

        Raises UsageError where something of it is missing.
        """
        if not self.url:
            return None
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"--url {self.url}: begins neither with http:// nor with https://")
        if not self.model:
            raise UsageError(f"--url {self.url}: name the model that it serves with --model")
        key = os.environ.get(self.api_key_env, "").strip()
        if self.api_key_env and not key:
            raise UsageError(
                f"--api_key_env {self.api_key_env}: this environment variable is not set"
            )
        return Endpoint(url=self.url, model=self.model, key=key, timeout_s=self.timeout)

    def length(self, context: int) -> int:
        """Return the most tokens of a prompt with its answers.

        Raises UsageError where the context holds fewer.
        """
        length = self.max_length or min(LONGEST, context)
        longest_piece = self.prompt_tokens[1]
        if length > context:
            raise UsageError(f"--max_length {length}: the model's context holds {context} tokens")
        if length < longest_piece + 1 + LEAST_ROOM:
            raise UsageError(
                f"--max_length {length}: too short for pieces of {longest_piece} tokens and answers"
            )
        return length

    def identity(self, file: GGUFFile) -> dict[str, Any]:
        """Return what must not change while a file of answers is written.

        Prompts are named only: a changed prompt has another id.
        """
        local = Path(self.prompts).expanduser()
        kept = {
            f"--{name}": value for name, value in vars(self).items() if name not in FREE_TO_CHANGE
        }
        return {
            "base model": file.file_fingerprint()[:12],
            "--prompts": Path(self.prompts).name if local.exists() else self.prompts,
            **kept,
        }
