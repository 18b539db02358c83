"""What crosses the border between the web server and the process that owns the model: plain data, nothing else.

A `Job` goes in; events come out: one `Started`, any number of `Piece`s, then one `Finished` or one `Failed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from model.decoding.planning import Draft


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are off. seed None: one of the server's own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One text to write. prompt: text, token ids, or chat messages ({"role", "content"}) for the model's template.

    max_tokens None: as many as the context holds. logprobs: how many alternatives per token are wanted (None: not even
    the token's own). grammar: GBNF; json_schema: a schema (an empty one: any object) that becomes a grammar.
    typical: Medusa's lossy acceptance, opt-in. fresh: read the whole prompt, whatever the cache holds.
    """

    id: str
    prompt: str | list[int] | list[dict[str, Any]]
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    draft: Draft = "auto"
    typical: bool = False
    logprobs: int | None = None
    echo: bool = False
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    fresh: bool = False


@dataclass(frozen=True)
class TokenInfo:
    """One token of a piece. drafted: it came free, accepted from a draft. top: (text, log probability), best first."""

    id: int
    text: str
    drafted: bool
    logprob: float | None = None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """The prompt has been read. cached: how many of its tokens were in the cache already."""

    id: str
    prompt_tokens: int
    cached: int = 0


@dataclass(frozen=True)
class Piece:
    """Text that has become certain, and the tokens won with it (never half a character, no part of a stop)."""

    id: str
    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The text is done. Seconds are those of this request; accepted per depth from 1."""

    id: str
    reason: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int
    prompt_s: float
    predicted_s: float
    steps: int
    drafted: int
    accepted: int
    accepted_per_depth: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The text cannot be (or go on to be) written. kind "bad_request": the client's fault."""

    id: str
    kind: Literal["bad_request", "internal"]
    message: str


Event = Started | Piece | Finished | Failed


def merged(events: list[Event]) -> list[Event]:
    """Join a text's pieces where they follow each other; another text's events may stand between."""
    out, open_pieces = list[Event](), dict[str, int]()
    for event in events:
        at = open_pieces.get(event.id) if isinstance(event, Piece) else open_pieces.pop(event.id, None)
        if isinstance(event, Piece) and at is not None:
            before = out[at]
            assert isinstance(before, Piece)
            out[at] = Piece(event.id, before.text + event.text, before.tokens + event.tokens)
            continue
        if isinstance(event, Piece):
            open_pieces[event.id] = len(out)
        out.append(event)
    return out


@dataclass(frozen=True)
class ModelInfo:
    """What the server tells of the model."""

    name: str
    file_type: str
    context: int
    vocabulary: int
    draft: str  # what drafts where a request says "auto", in words
    slots: int
    cells: int  # tokens that the cache holds, of all texts
    chat: bool  # whether the GGUF has a chat template
    longest_token: int = 0  # in bytes
