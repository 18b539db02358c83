"""Answers: OpenAI's JSON for events, whole or as a stream's chunks, of completions and of chats.

Pure; knows no HTTP.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from model.decoding.sequence import TokenOutput
from model.serving.http.running_request import Choice, RunningRequest
from model.serving.http.schemas import GenerationRequest
from model.serving.worker.messages import TextChunk

_MIN_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI's number for it

Json = dict[str, Any]


class Answer:
    """The answer to one request. Subclasses: what differs between completions and chats."""

    prefix = ""  # of its id
    whole_object = ""
    chunk_object = ""

    def __init__(self, running: RunningRequest, request: GenerationRequest, model: str) -> None:
        self._running = running
        self._request = request
        self._head: Json = {"id": running.id, "created": int(time.time()), "model": model}
        if request.typical_acceptance:
            # Typical acceptance leaves the base model's own distribution.
            self._head["lossy"] = True

    def whole(self, chunks: Sequence[Sequence[TextChunk]]) -> Json:
        """Return the answer at once. chunks: those of each choice."""
        choices = []
        for choice, parts in zip(self._running.choices, chunks, strict=True):
            assert choice.finished is not None
            tokens = [token for part in parts for token in part.tokens]
            content = self._message("".join(part.text for part in parts))
            entry = self._choice(choice, content, tokens)
            choices.append(entry | {"finish_reason": choice.finished.reason})
        return {
            **self._head,
            "object": self.whole_object,
            "choices": choices,
            **self._totals(),
        }

    def opening(self, choice: Choice) -> list[Json]:
        """Return the chunks that come before a choice's first text."""
        return []

    def chunk(self, choice: Choice, chunk: TextChunk) -> list[Json]:
        """Return the chunks for a text chunk: none where it holds nothing that was asked for."""
        wants_tokens = self._request.wants_logprobs or self._request.token_details
        if not (chunk.text or (chunk.tokens and wants_tokens)):
            return []
        entry = self._choice(choice, self._delta(chunk.text), chunk.tokens)
        return [self._chunk([entry | {"finish_reason": None}])]

    def ending(self, choice: Choice) -> list[Json]:
        """Return the chunks that end a choice: its finish reason and its timings."""
        assert choice.finished is not None
        entry = {
            "index": choice.index,
            **self._delta(None),
            "logprobs": None,
            "finish_reason": choice.finished.reason,
        }
        return [self._chunk([entry]) | {"timings": timings([choice])}]

    def closing(self) -> list[Json]:
        """Return the chunk behind the last choice: the usage of all, where it was asked for."""
        if not self._request.include_usage:
            return []
        return [self._chunk([]) | self._totals()]

    def _totals(self) -> Json:
        choices = self._running.choices
        return {"usage": usage(choices, self._running.n), "timings": timings(choices)}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._request.include_usage:
            chunk["usage"] = None
        return chunk

    def _choice(self, choice: Choice, content: Json, tokens: Sequence[TokenOutput]) -> Json:
        entry = {"index": choice.index, **content, "logprobs": None}
        if self._request.wants_logprobs:
            entry["logprobs"] = self._logprobs(choice, tokens)
        if self._request.token_details:
            entry["tokens"] = [{"id": t.id, "text": t.text, "drafted": t.drafted} for t in tokens]
        return entry

    def _message(self, content: str) -> Json:
        raise NotImplementedError

    def _delta(self, content: str | None) -> Json:
        raise NotImplementedError

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenOutput]) -> Json:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Answers of /v1/completions."""

    prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def _message(self, content: str) -> Json:
        return {"text": content}

    def _delta(self, content: str | None) -> Json:
        return {"text": content or ""}

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenOutput]) -> Json:
        offsets = []
        for token in tokens:
            offsets.append(choice.text_offset)
            choice.text_offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": offsets,
        }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _MIN_LOGPROB)


def _alternatives(token: TokenOutput) -> Json | None:
    """Return the alternatives by text, the token itself among them.

    Of equal texts the likeliest counts.
    """
    if token.logprob is None:  # a sequence's very first token has no probability
        return None
    alternatives: Json = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        alternatives.setdefault(text, max(logprob, _MIN_LOGPROB))
    return alternatives


class ChatAnswer(Answer):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, choice: Choice) -> list[Json]:
        """Return the chunk that names the role."""
        entry = {
            "index": choice.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return [self._chunk([entry])]

    def _message(self, content: str) -> Json:
        return {"message": {"role": "assistant", "content": content, "refusal": None}}

    def _delta(self, content: str | None) -> Json:
        return {"delta": {} if content is None else {"content": content}}

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenOutput]) -> Json:
        content = []
        for token in tokens:
            top = [_chat_logprob(text, logprob) for text, logprob in token.top]
            content.append({**_chat_logprob(token.text, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


def _chat_logprob(text: str, logprob: float | None) -> Json:
    value = _finite(logprob)
    return {
        "token": text,
        "logprob": _MIN_LOGPROB if value is None else value,
        "bytes": list(text.encode(errors="replace")),
    }


def usage(choices: Sequence[Choice], n: int) -> Json:
    """Return OpenAI's count of tokens; the n choices of a prompt share it."""
    new_tokens = sum(choice.finished.new_tokens for choice in choices if choice.finished)
    one_per_prompt = choices[::n]
    prompt_tokens = sum(c.finished.prompt_tokens for c in one_per_prompt if c.finished)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(choice.cached_tokens for choice in one_per_prompt)
        },
    }


def timings(choices: Sequence[Choice]) -> Json:
    """Return how fast choices came, and what was drafted and accepted for them.

    Tokens of several choices add up; of their times the longest counts.
    """
    ends = [choice.finished for choice in choices if choice.finished]
    cached = sum(choice.cached_tokens for choice in choices)
    prefilled = sum(end.prompt_tokens for end in ends) - cached
    new_tokens = sum(end.new_tokens for end in ends)
    prompt_s = max(end.prompt_s for end in ends)
    predicted_s = max(end.predicted_s for end in ends)
    steps = sum(end.steps for end in ends)
    depths = zip_longest(*(end.accepted_per_depth for end in ends), fillvalue=0)
    return {
        "cache_n": cached,
        "prompt_n": prefilled,
        "prompt_ms": round(prompt_s * 1e3, 3),
        "prompt_per_second": _ratio(prefilled, prompt_s, 2),
        "predicted_n": new_tokens,
        "predicted_ms": round(predicted_s * 1e3, 3),
        "predicted_per_second": _ratio(new_tokens, predicted_s, 2),
        "steps": steps,
        "drafted": sum(end.drafted for end in ends),
        "accepted": sum(end.accepted for end in ends),
        "acceptance_length": _ratio(new_tokens, steps, 3),
        "accepted_per_depth": [sum(accepted) for accepted in depths],
        "drafted_by_source": _added(end.drafted_by_source for end in ends),
        "accepted_by_source": _added(end.accepted_by_source for end in ends),
    }


def _ratio(amount: float, over: float, digits: int) -> float | None:
    return round(amount / over, digits) if over > 0 else None


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for by_source in counts:
        total.update(by_source)
    return dict(total)
