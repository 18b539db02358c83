"""Messages between the web server and the process that owns the model: plain data, nothing else.

A `SequenceRequest` goes in; its events come out: one `Started`, any number of `TextChunk`s, then
one `Finished` or one `Failed`. Knows neither HTTP nor the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from model.decoding.drafters.sources import Sources
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import FinishReason, TokenOutput


@dataclass(frozen=True, kw_only=True)
class SequenceRequest:
    """One sequence to generate.

    prompt: text, token ids, or chat messages ({"role", "content"}) for the model's template.
    max_tokens: new ones at the most; None: as many as the context holds.
    draft: the sources that may draft. typical_acceptance: Medusa's lossy rule, opt-in.
    logprobs: how many alternatives per token are wanted; None: not even the token's own.
    echo: the prompt belongs to the text. grammar: GBNF.
    json_schema: a schema (an empty one: any object) that becomes a grammar.
    use_prefix_cache: False prefills the whole prompt, whatever the cache holds.
    """

    id: str
    prompt: str | list[int] | list[dict[str, Any]]
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    draft: Sources = "auto"
    typical_acceptance: bool = False
    logprobs: int | None = None
    echo: bool = False
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    use_prefix_cache: bool = True


@dataclass(frozen=True)
class Started:
    """The prompt has been prefilled. cached_tokens: those of them that the prefix cache held."""

    id: str
    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class TextChunk:
    """Text that has become certain, and its tokens.

    It holds no half of a character and no part of a stop string.
    """

    id: str
    text: str
    tokens: tuple[TokenOutput, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The sequence is complete.

    prompt_s, predicted_s: seconds of this sequence's prefill and decoding. steps: verify passes.
    drafted, accepted: draft tokens. accepted_per_depth: from depth 1 on.
    drafted_by_source, accepted_by_source: the same by the name of the draft source.
    """

    id: str
    reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    prompt_s: float
    predicted_s: float
    steps: int
    drafted: int
    accepted: int
    accepted_per_depth: tuple[int, ...] = ()
    drafted_by_source: dict[str, int] = field(default_factory=dict)
    accepted_by_source: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The sequence cannot be generated to its end. kind "bad_request": the client's fault."""

    id: str
    kind: Literal["bad_request", "internal"]
    message: str


Event = Started | TextChunk | Finished | Failed


def merged(events: list[Event]) -> list[Event]:
    """Join a sequence's chunks in a row; events of other sequences may lie between them."""
    joined = list[Event]()
    # Where in `joined` the last event of a sequence is, if it is a chunk.
    open_chunks = dict[str, int]()
    for event in events:
        if not isinstance(event, TextChunk):
            open_chunks.pop(event.id, None)
            joined.append(event)
            continue
        index = open_chunks.get(event.id)
        if index is None:
            open_chunks[event.id] = len(joined)
            joined.append(event)
            continue
        before = joined[index]
        assert isinstance(before, TextChunk)
        joined[index] = TextChunk(event.id, before.text + event.text, before.tokens + event.tokens)
    return joined


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the server tells about the model.

    context: tokens of one sequence at the most. vocabulary: how many tokens there are.
    draft: what drafts where a request says "auto", in words.
    slots: sequences that run at the same time.
    cells: tokens that the KV cache holds, of all sequences. longest_token: bytes; 0: unknown.
    measuring: what drafts cost and bring is not measured yet, so nothing drafts.
    """

    name: str
    file_type: str
    context: int
    vocabulary: int
    draft: str
    slots: int
    cells: int
    has_chat_template: bool
    longest_token: int = 0
    measuring: bool = False
