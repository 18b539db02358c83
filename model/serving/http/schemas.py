"""The schemas of requests: OpenAI's completions and chats with our extensions, every bound checked.

A request becomes a `RunningRequest` here. Unknown fields are ignored, as OpenAI's clients expect;
those that would change the answer and are not supported are refused. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from model.decoding.drafters.sources import Sources
from model.decoding.sampling import SamplingParams
from model.serving.http.errors import ApiError
from model.serving.http.fields import (
    MAX_TOKENS,
    Message,
    Refused,
    ResponseFormat,
    StreamOptions,
    Strict,
    bad_value,
    read_biases,
    read_draft,
    read_prompts,
    read_stops,
)
from model.serving.http.running_request import RunningRequest
from model.serving.worker.messages import ModelInfo, SequenceRequest

MAX_CHOICES = 128  # of one request, over all of its prompts
_N_SEEDS = 2**63
AnyPrompt = str | list[int] | list[dict[str, Any]]


class GenerationRequest(Strict):
    """What both kinds of completion share.

    The last six fields are extensions; they have llama.cpp's names where it has them.
    draft: the sources that may draft: auto (all there are), heads, ngram, both, none; `medusa` is
    an alias of `heads`. typical_acceptance: Medusa's lossy rule. token_details: say of each token
    whether it was drafted. cache_prompt: false prefills the whole prompt.
    """

    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MAX_TOKENS)  # 0 and -1: off
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-_N_SEEDS, lt=_N_SEEDS)
    stop: Annotated[list[str], BeforeValidator(read_stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    logit_bias: Annotated[dict[int, float], BeforeValidator(read_biases)] = Field(
        default_factory=dict
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repeat_penalty: float = Field(default=1.0, ge=0.01, le=10)
    user: str | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = Field(default=None, min_length=1)
    draft: Annotated[Sources, BeforeValidator(read_draft)] = "auto"
    typical_acceptance: bool = False
    token_details: bool = False
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

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer holds log probabilities."""
        return self._logprobs() is not None

    def _prompts(self) -> Sequence[AnyPrompt]:
        raise NotImplementedError

    def _logprobs(self) -> int | None:
        raise NotImplementedError

    def _echo(self) -> bool:
        return False

    def running(self, id: str, info: ModelInfo, most: int = MAX_CHOICES) -> RunningRequest:
        """Return the request with a choice for each of its answers, ready to be submitted.

        The choices of the first prompt come first; those of one prompt have seeds one apart.
        most: how many sequences the server can hold at once. Raises ApiError where that is not
        enough, where the model lacks a token, or where a prompt cannot fit into the context
        however it is tokenized: a tokenizer takes seconds for megabytes.
        """
        prompts = self._prompts()
        if len(prompts) * self.n > most:
            message = f"{len(prompts)} prompts × n={self.n} are more than {most} sequences at once"
            raise ApiError(400, message, param="n")
        self._check_tokens(prompts, info.vocabulary)
        shortest = max(_min_tokens(prompt, info.longest_token) for prompt in prompts)
        if shortest >= info.context:
            message = f"the prompt has at least {shortest} tokens, the context {info.context}"
            raise ApiError(400, message)
        sequences = list[SequenceRequest]()
        for prompt in prompts:
            for choice in range(self.n):
                sequences.append(self._sequence(f"{id}-{len(sequences)}", prompt, choice))
        return RunningRequest(id, sequences, self.n)

    def _check_tokens(self, prompts: Sequence[AnyPrompt], vocabulary: int) -> None:
        tokens = [token for prompt in prompts for token in prompt if isinstance(token, int)]
        for field, used in (("prompt", tokens), ("logit_bias", self.logit_bias)):
            unknown = [token for token in used if token >= vocabulary]
            if unknown:
                message = (
                    f"{field}: there is no token {unknown[0]}; the vocabulary has {vocabulary}"
                )
                raise ApiError(400, message, param=field)

    def _sequence(self, id: str, prompt: AnyPrompt, choice: int) -> SequenceRequest:
        return SequenceRequest(
            id=id,
            prompt=prompt,
            max_tokens=self._max_tokens(),
            sampling=self._sampling(choice),
            stop=tuple(self.stop),
            draft=self.draft,
            typical_acceptance=self.typical_acceptance,
            logprobs=self._logprobs(),
            echo=self._echo(),
            grammar=self.grammar,
            json_schema=self._json_schema(),
            use_prefix_cache=self.cache_prompt,
        )

    def _max_tokens(self) -> int | None:
        for limit in (self.max_completion_tokens, self.max_tokens):
            if limit is not None:
                return limit
        return self.default_max_tokens

    def _sampling(self, choice: int) -> SamplingParams:
        seed = None
        if self.seed is not None:
            seed = (self.seed + choice) % _N_SEEDS
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repeat_penalty=self.repeat_penalty,
            logit_bias=self.logit_bias,
        )

    def _json_schema(self) -> dict[str, Any] | None:
        """Return the schema that the text must fit; an empty one: any JSON object."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.json_schema is None:
            return {}
        return form.json_schema.content


def _min_tokens(prompt: AnyPrompt, longest: int) -> int:
    """Return how many tokens a prompt has at least.

    longest: bytes of the vocabulary's longest token; 0: unknown.
    """
    if isinstance(prompt, str):
        texts = [prompt]
    else:
        texts = [str(message["content"]) for message in prompt if isinstance(message, dict)]
        if not texts:  # token ids
            return len(prompt)
    n_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    return n_bytes // longest if longest else 0


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. max_tokens 0 with echo only judges the prompt."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(read_prompts)]
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1)
    suffix: Refused = None

    default_max_tokens: ClassVar[int | None] = 16  # OpenAI's

    @model_validator(mode="after")
    def _completion_fields_agree(self) -> Self:
        if self.best_of not in (None, self.n):
            message = f"best_of={self.best_of}: all choices are returned, so it can only be n"
            raise bad_value(message)
        if 0 in (self.max_tokens, self.max_completion_tokens) and not self.echo:
            raise bad_value("max_tokens=0: nothing to generate; it is of use only with echo=true")
        return self

    def _prompts(self) -> Sequence[AnyPrompt]:
        return self.prompt

    def _logprobs(self) -> int | None:
        return self.logprobs

    def _echo(self) -> bool:
        return self.echo


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. Chat templates are the model's own; clients' are refused."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
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

    def _prompts(self) -> Sequence[AnyPrompt]:
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

    tokens: list[Annotated[int, Field(ge=0, le=MAX_TOKENS)]]


class TemplateRequest(Strict):
    """POST /apply-template."""

    messages: list[Message] = Field(min_length=1)
    chat_template: Refused = None
    chat_template_kwargs: Refused = None
