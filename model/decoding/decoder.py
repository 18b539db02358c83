"""The decoder: a context of the base model, a draft policy and drafters, run by a scheduler.

Knows no heads and no settings: whoever makes one hands in a base and a drafter.
"""

from __future__ import annotations

import collections.abc as abc
from typing import Any, Protocol

from typing_extensions import Self

from model.decoding.draft_policy import DraftPolicy
from model.decoding.drafters.drafter import Drafters
from model.decoding.prompt_cache import PromptCache
from model.decoding.request import Request
from model.decoding.scheduler import Scheduler
from model.decoding.sequence import Output, Sequence, Vocabulary
from model.decoding.step import Base


class ClosableBase(Base, Protocol):
    """What a decoder needs of `model.base.llama.LlamaBase`."""

    n_ctx: int
    n_vocab: int

    def clear(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Decoder:
    """Sequences with the same base, policy and drafters. As a context manager it closes its base.

    context: tokens that one sequence may come to. drafters: None: nothing drafts. max_running:
    sequences at a time. prompt_cache: what finished sequences leave, and
    prompts that begin alike are read once; None: neither. max_stall_s: see
    Scheduler.
    """

    def __init__(
        self,
        base: ClosableBase,
        vocabulary: Vocabulary,
        policy: DraftPolicy,
        drafters: Drafters | None = None,
        *,
        context: int,
        max_running: int = 1,
        prompt_cache: PromptCache | None = None,
        max_stall_s: float = 0.0,
    ) -> None:
        self.base = base
        self.policy = policy
        self.context = context
        self.drafters = drafters or Drafters()
        self._vocabulary = vocabulary
        self._max_running = max_running
        self._prompt_cache = prompt_cache
        self._max_stall_s = max_stall_s
        self.scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self.base,
            self.policy,
            max_running=self._max_running,
            n_cells=self.base.n_ctx,
            max_stall_s=self._max_stall_s,
            prompt_cache=self._prompt_cache,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.base.close()

    def new_sequence(
        self, request: Request, *, sources: abc.Collection[str] | None = None, **options: Any
    ) -> Sequence:
        """Make a sequence with this decoder's drafters, which is not queued yet.

        sources: the names of the draft sources that it may use; None: all. options: as Sequence
        takes them.
        """
        sequence = Sequence(
            request.prompt,
            self._vocabulary,
            request.sampling,
            context=self.context,
            max_tokens=request.max_tokens,
            stop=request.stop,
            **options,
        )
        for source, drafter in self.drafters.trees.items():
            if sources is None or source in sources:
                sequence.tree_drafters[source] = drafter
        for source, new_drafter in self.drafters.continuations.items():
            if sources is None or source in sources:
                sequence.continuation_drafters[source] = new_drafter(sequence.tokens)
        return sequence

    def reset(self) -> None:
        """Forget all sequences and empty the cache."""
        self.base.clear()
        self.scheduler = self._new_scheduler()

    def start(self, request: Request, **options: Any) -> Sequence:
        """Begin a sequence on an empty cache, whatever was there before."""
        self.reset()
        sequence = self.new_sequence(request, **options)
        self.scheduler.add(sequence)
        return sequence

    def stream(self, sequence: Sequence) -> abc.Iterator[Output]:
        """Step until a queued sequence is finished; yield its text as it becomes certain.

        Stopped early, it is aborted. With other sequences queued these go on meanwhile.
        """
        try:
            while not sequence.finished:
                self.scheduler.step()
                yield sequence.take_output()
        finally:
            self.scheduler.abort(sequence)

    def run(self, request: Request, **options: Any) -> Sequence:
        """Generate on an empty cache from beginning to end."""
        sequence = self.start(request, **options)
        self.finish(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Step until a queued sequence is finished."""
        while not sequence.finished:
            self.scheduler.step()
