"""What one sequence is asked to generate, before it is one. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.decoding.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    prompt: token ids. max_tokens: new ones at the most; None: as many as the context holds.
    stop: strings that end the text.
    """

    prompt: list[int]
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
