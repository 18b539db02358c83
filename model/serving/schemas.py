"""What clients may send: OpenAI's completions and chat completions with our extensions, every bound checked.

Turns a request into jobs. Unknown fields are ignored, as OpenAI's clients expect; those that would change the answer
and are not supported are refused. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from model.decoding.planning import Draft
from model.serving.errors import ApiError
from model.serving.fields import (
    MOST_TOKENS,
    Message,
    Refused,
    ResponseFormat,
    StreamOptions,
    Strict,
    bad_value,
    read_biases,
    read_prompts,
    read_stops,
)
from model.serving.jobs import Job, ModelInfo, Sampling

MOST_TEXTS = 128  # choices of one request, over all of its prompts
_SEEDS = 2**63
Prompt = str | list[int] | list[dict[str, Any]]


class TextRequest(Strict):
    """What both kinds of completion share. The last six are extensions; llama.cpp's names where it has them."""

    max_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MOST_TOKENS)  # 0 and -1: off
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-_SEEDS, lt=_SEEDS)
    stop: Annotated[list[str], BeforeValidator(read_stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MOST_TEXTS)
    logit_bias: Annotated[dict[int, float], BeforeValidator(read_biases)] = Field(default_factory=dict)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repeat_penalty: float = Field(default=1.0, gt=0, le=10)
    user: str | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = Field(default=None, min_length=1)
    draft: Draft = "auto"
    typical_acceptance: bool = False  # Medusa's lossy rule
    token_details: bool = False  # tell of each token whether it was drafted
    cache_prompt: bool = True

    default_max_tokens: ClassVar[int | None] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.stream_options and not self.stream:
            raise bad_value("stream_options is allowed only with stream=true")
        if self.grammar and self.response_format and self.response_format.type != "text":
            raise bad_value("grammar and response_format exclude each other")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _prompts(self) -> Sequence[Prompt]:
        raise NotImplementedError

    def _logprobs(self) -> int | None:
        raise NotImplementedError

    def _echo(self) -> bool:
        return False

    def jobs(self, id: str, info: ModelInfo, most: int = MOST_TEXTS) -> list[Job]:
        """Return a job per choice: all of the first prompt, all of the second …, the choices' seeds one apart.

        most: how many texts the server can hold at once. Raises ApiError where the model lacks a token, or where a
        prompt cannot fit into the context, however it is tokenized: a tokenizer takes seconds for megabytes.
        """
        prompts = self._prompts()
        if len(prompts) * self.n > most:
            raise ApiError(400, f"{len(prompts)} prompts × n={self.n} are more than {most} texts at once", param="n")
        tokens = [t for p in prompts for t in p if isinstance(t, int)]
        for name, used in (("prompt", tokens), ("logit_bias", self.logit_bias)):
            if wrong := [t for t in used if t >= info.vocabulary]:
                message = f"{name}: there is no token {wrong[0]}; the vocabulary has {info.vocabulary}"
                raise ApiError(400, message, param=name)
        least = max((_least_tokens(prompt, info.longest_token) for prompt in prompts), default=0)
        if least >= info.context:
            raise ApiError(400, f"the prompt has {least} tokens at the least, the context {info.context}")
        return [
            self._job(f"{id}-{i * self.n + choice}", prompt, choice)
            for i, prompt in enumerate(prompts)
            for choice in range(self.n)
        ]

    def _job(self, id: str, prompt: Prompt, choice: int) -> Job:
        limits = [m for m in (self.max_completion_tokens, self.max_tokens, self.default_max_tokens) if m is not None]
        form = self.response_format
        schema = None if form is None or form.type == "text" else form.json_schema.content if form.json_schema else {}
        sampling = Sampling(
            self.temperature,
            self.top_p,
            max(self.top_k, 0),
            self.min_p,
            None if self.seed is None else (self.seed + choice) % _SEEDS,
            self.presence_penalty,
            self.frequency_penalty,
            self.repeat_penalty,
            self.logit_bias,
        )
        return Job(
            id,
            prompt,
            max_tokens=limits[0] if limits else None,
            sampling=sampling,
            stop=tuple(self.stop),
            draft=self.draft,
            typical=self.typical_acceptance,
            logprobs=self._logprobs(),
            echo=self._echo(),
            grammar=self.grammar,
            json_schema=schema,
            fresh=not self.cache_prompt,
        )


def _least_tokens(prompt: Prompt, longest: int) -> int:
    """Return how many tokens a prompt has at the least. longest: bytes of the vocabulary's longest one; 0: unknown."""
    if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
        return len(prompt)
    texts = [prompt] if isinstance(prompt, str) else [str(m["content"]) for m in prompt if isinstance(m, dict)]
    return sum(len(text.encode(errors="replace")) for text in texts) // longest if longest else 0


class CompletionRequest(TextRequest):
    """POST /v1/completions. max_tokens 0 with echo only looks at the prompt."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(read_prompts)]
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1)
    suffix: Refused = None

    default_max_tokens: ClassVar[int | None] = 16  # OpenAI's

    @model_validator(mode="after")
    def _completion_fields_agree(self) -> Self:
        if self.best_of not in (None, self.n):
            raise bad_value(f"best_of={self.best_of}: all texts are returned, so it can only be n")
        if 0 in (self.max_tokens, self.max_completion_tokens) and not self.echo:
            raise bad_value("max_tokens=0: nothing to write; it is of use only with echo=true")
        return self

    def _prompts(self) -> Sequence[Prompt]:
        return self.prompt

    def _logprobs(self) -> int | None:
        return self.logprobs

    def _echo(self) -> bool:
        return self.echo


class ChatRequest(TextRequest):
    """POST /v1/chat/completions. Templates are the model's own; those of clients are refused."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    chat_template: Refused = None
    chat_template_kwargs: Refused = None
    tools: Refused = None
    functions: Refused = None

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise bad_value(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        return self

    def _prompts(self) -> Sequence[Prompt]:
        return [[message.plain() for message in self.messages]]

    def _logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TokenizeRequest(Strict):
    """POST /tokenize, as llama.cpp's server has it."""

    content: str
    add_special: bool = False
    parse_special: bool = True


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, le=MOST_TOKENS)]]


class TemplateRequest(Strict):
    """POST /apply-template."""

    messages: list[Message] = Field(min_length=1)
    chat_template: Refused = None
    chat_template_kwargs: Refused = None
