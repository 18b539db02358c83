"""Events to OpenAI's JSON: whole answers and chunks of streams, of completions and of chats. Pure; knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from model.serving.jobs import Piece, TokenInfo
from model.serving.schemas import TextRequest
from model.serving.texts import Text

_LEAST = -9999.0  # JSON has no minus infinity; OpenAI's number for it

Json = dict[str, Any]


class Answer:
    """How the answer to one request is told. Subclasses: what differs between completions and chats."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, id: str, model: str, request: TextRequest, *, logprobs: bool) -> None:
        self.request, self._logprobs = request, logprobs
        self._head: Json = {"id": id, "created": int(time.time()), "model": model}
        if request.typical_acceptance:
            self._head["lossy"] = True  # typical acceptance leaves the model's own distribution

    def whole(self, texts: Sequence[Text], pieces: Sequence[Sequence[Piece]]) -> Json:
        """Return the answer at once. pieces: those of each text."""
        choices = []
        for text, parts in zip(texts, pieces, strict=True):
            assert text.finished is not None
            tokens = [token for part in parts for token in part.tokens]
            choice = self._choice(text, self._message("".join(part.text for part in parts)), tokens)
            choices.append(choice | {"finish_reason": text.finished.reason})
        head = {**self._head, "object": self.whole_object, "choices": choices}
        return {**head, "usage": usage(texts, self.request.n), "timings": timings(texts)}

    def opening(self, text: Text) -> list[Json]:
        """Return the chunks that come before a text's first piece."""
        return []

    def chunk(self, text: Text, piece: Piece) -> list[Json]:
        """Return the chunks for a piece: none where it holds nothing that was asked for."""
        if not (piece.text or (piece.tokens and (self._logprobs or self.request.token_details))):
            return []
        choice = self._choice(text, self._delta(piece.text), piece.tokens)
        return [self._chunk([choice | {"finish_reason": None}])]

    def ending(self, text: Text) -> list[Json]:
        """Return the chunks that end a text: the reason, and its own timings."""
        assert text.finished is not None
        choice = {"index": text.index, **self._delta(None), "logprobs": None, "finish_reason": text.finished.reason}
        return [self._chunk([choice]) | {"timings": timings([text])}]

    def closing(self, texts: Sequence[Text]) -> list[Json]:
        """Return the chunk after the last text: the usage of all, where it was asked for."""
        if not self.request.include_usage:
            return []
        return [self._chunk([]) | {"usage": usage(texts, self.request.n), "timings": timings(texts)}]

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        return chunk | {"usage": None} if self.request.include_usage else chunk

    def _choice(self, text: Text, content: Json, tokens: Sequence[TokenInfo]) -> Json:
        choice = {"index": text.index, **content, "logprobs": self._told(text, tokens) if self._logprobs else None}
        if self.request.token_details:
            choice["tokens"] = [{"id": t.id, "text": t.text, "drafted": t.drafted} for t in tokens]
        return choice

    def _message(self, content: str) -> Json:
        raise NotImplementedError

    def _delta(self, content: str | None) -> Json:
        raise NotImplementedError

    def _told(self, text: Text, tokens: Sequence[TokenInfo]) -> Json:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Answers of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _message(self, content: str) -> Json:
        return {"text": content}

    def _delta(self, content: str | None) -> Json:
        return {"text": content or ""}

    def _told(self, text: Text, tokens: Sequence[TokenInfo]) -> Json:
        offsets = []
        for token in tokens:
            offsets.append(text.offset)
            text.offset += len(token.text)
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [None if t.logprob is None else max(t.logprob, _LEAST) for t in tokens],
            "top_logprobs": [_top(t) for t in tokens],
            "text_offset": offsets,
        }


def _top(token: TokenInfo) -> Json | None:
    """Return the alternatives by text, the token itself among them; of equal texts the likeliest counts."""
    if token.logprob is None:  # a text's very first token has no probability
        return None
    top: Json = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        top.setdefault(text, max(logprob, _LEAST))
    return top


class ChatAnswer(Answer):
    """Answers of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, text: Text) -> list[Json]:
        """Return the chunk that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": text.index, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def _message(self, content: str) -> Json:
        return {"message": {"role": "assistant", "content": content, "refusal": None}}

    def _delta(self, content: str | None) -> Json:
        return {"delta": {} if content is None else {"content": content}}

    def _told(self, text: Text, tokens: Sequence[TokenInfo]) -> Json:
        return {
            "content": [
                {**_said(t.text, t.logprob), "top_logprobs": [_said(*alternative) for alternative in t.top]}
                for t in tokens
            ],
            "refusal": None,
        }


def _said(text: str, logprob: float | None) -> Json:
    value = _LEAST if logprob is None else max(logprob, _LEAST)
    return {"token": text, "logprob": value, "bytes": list(text.encode(errors="replace"))}


def usage(texts: Sequence[Text], n: int) -> Json:
    """Return OpenAI's count of tokens; the n texts of a prompt share it."""
    new = sum(text.finished.new_tokens for text in texts if text.finished)
    read = sum(text.finished.prompt_tokens for text in texts[::n] if text.finished)
    cached = sum(text.cached for text in texts[::n])
    return {
        "prompt_tokens": read,
        "completion_tokens": new,
        "total_tokens": read + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(texts: Sequence[Text]) -> Json:
    """Return how fast texts came and what drafts won. Of several: tokens add up, the longest time counts."""
    ends = [text.finished for text in texts if text.finished]
    cached = sum(text.cached for text in texts)
    read, written = sum(e.prompt_tokens for e in ends) - cached, sum(e.new_tokens for e in ends)
    prompt_s, predicted_s = max(e.prompt_s for e in ends), max(e.predicted_s for e in ends)
    steps = sum(e.steps for e in ends)
    return {
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": round(prompt_s * 1e3, 3),
        "prompt_per_second": round(read / prompt_s, 2) if prompt_s > 0 else None,
        "predicted_n": written,
        "predicted_ms": round(predicted_s * 1e3, 3),
        "predicted_per_second": round(written / predicted_s, 2) if predicted_s > 0 else None,
        "steps": steps,
        "drafted": sum(e.drafted for e in ends),
        "accepted": sum(e.accepted for e in ends),
        "acceptance_length": round(written / steps, 3) if steps else None,
        "accepted_per_depth": [sum(d) for d in zip_longest(*(e.accepted_per_depth for e in ends), fillvalue=0)],
    }
