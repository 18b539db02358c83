"""One text from its prompt to its end: one slot, stepped until done. Knows no heads and no HTTP."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from model.decoding.drafting import Drafter
from model.decoding.ngram import NgramIndex
from model.decoding.planning import Plan
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.slot import Slot
from model.decoding.step import Base, prefill, step
from model.errors import ContextError, UsageError


@dataclass(frozen=True)
class Request:
    """What to write: prompt ids, how many new tokens at the most, how to choose them, what ends the text."""

    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()


class TextStream:
    """Bytes in, text out: never half a character, and nothing that may turn out to begin a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise UsageError("a stop string is empty")
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._ready: list[str] = []
        self.stopped = False

    def feed(self, piece: bytes) -> bool:
        """Take a token's bytes; say whether a stop string is complete (it and what follows is cut off)."""
        self._held += self._decoder.decode(piece)
        if not self._stop:
            self._release(len(self._held))
            return False
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self._release(len(self._held))
            self.stopped = True
            return True
        longest = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        self._release(len(self._held) - longest)
        return False

    def _release(self, n: int) -> None:
        if n:
            self._ready.append(self._held[:n])
            self._held = self._held[n:]

    def take(self) -> str:
        """Return the text that has become certain since the last call."""
        text = "".join(self._ready)
        self._ready.clear()
        return text

    def finish(self) -> str:
        """Return the rest: held-back text, and replacement characters for half a character."""
        if not self.stopped:
            self._held += self._decoder.decode(b"", True)
            self._release(len(self._held))
        return self.take()


class Generation:
    """A text in the making. Iterate over it for pieces of text; `tokens`, `finish_reason`, `slot` tell the rest.

    Raises ContextError when the prompt leaves no room in `context` tokens.
    """

    def __init__(
        self,
        base: Base,
        piece: Callable[[int], bytes],
        eog: frozenset[int],
        request: Request,
        *,
        context: int,
        plan: Plan,
        drafter: Drafter | None = None,
        ngrams: bool = False,
        keep_logits: bool = False,
    ) -> None:
        if not request.prompt:
            raise UsageError("the prompt is empty, and this model has no begin-of-text token to start from")
        if len(request.prompt) >= context:
            raise ContextError(
                f"the prompt has {len(request.prompt)} tokens, the context {context}; shorten the prompt "
                "or raise MODEL_CONTEXT_SIZE"
            )
        if request.max_tokens < 1:
            raise UsageError(f"max_tokens {request.max_tokens} is below 1")
        self._base, self._plan, self._piece, self._eog = base, plan, piece, eog
        self._stream = TextStream(request.stop)
        limit = min(context, len(request.prompt) + request.max_tokens)
        lanes, sampler = range(plan.lanes), Sampler(request.sampling, request.prompt)
        self.slot = Slot(list(request.prompt), limit, sampler, self._ends, drafter, lanes)
        self.slot.ngrams = NgramIndex(self.slot.tokens) if ngrams else None
        self.slot.trace = [] if keep_logits else None
        self.finish_reason = ""

    def _ends(self, token: int) -> bool:
        """Say whether the text ends with this token; its bytes go into the stream in passing."""
        return token in self._eog or self._stream.feed(self._piece(token))

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return self.slot.tokens[self.slot.prompt_length :]

    def __iter__(self) -> Iterator[str]:
        prefill(self._base, self.slot)
        while not self.slot.finished:
            step(self._base, [self.slot], self._plan)
            yield self._stream.take()
        last = self.slot.tokens[-1]
        self.finish_reason = "stop" if self._stream.stopped or last in self._eog else "length"
        yield self._stream.finish()

    def run(self) -> str:
        """Generate to the end and return the whole text."""
        return "".join(self)
