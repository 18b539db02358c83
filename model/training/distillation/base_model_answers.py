"""Texts from the base model itself: many dialogues at once on one context.

Knows neither files nor options, nor what is said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from model.decoding.draft_policy import FixedPolicy
from model.decoding.loops import LoopWatch
from model.decoding.sampling import SamplingParams
from model.decoding.scheduler import Scheduler
from model.decoding.sequence import Sequence, Vocabulary
from model.decoding.step import Base


class Asking(Protocol):
    """A dialogue, as far as the base model takes part in it."""

    ids: list[int]

    def ask(self, max_length: int) -> bool:
        """Add to `ids` what comes before the model's next text; False where nothing does."""
        ...

    def answer(self, tokens: list[int], finish_reason: str) -> None:
        """Take what the model said; finish_reason: "stop", "length" or "loop"."""
        ...


D = TypeVar("D", bound=Asking)


def answer_with_base(
    base: Base,
    dialogues: Iterable[D],
    vocabulary: Vocabulary,
    sampling: Callable[[D], SamplingParams],
    *,
    parallel: int,
    max_length: int,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    cut_loops: bool = True,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Iterator[D]:
    """Yield the dialogues as they end, answered or with a problem, `parallel` at a time.

    base: on an empty cache, with `parallel` sequence ids of max_length tokens. sampling(dialogue):
    how its next answer is sampled. stop: texts that end an answer. on_tokens(n): n tokens were
    generated. An answer's draws depend on its own seed alone. But kernels round its logits
    differently in other company, so at a near-tie it may read differently there.
    """
    scheduler = Scheduler(base, FixedPolicy(), max_running=parallel, n_cells=parallel * max_length)
    new = iter(dialogues)
    again = deque[D]()  # conversations that go on come before new ones
    running: dict[Sequence, tuple[D, LoopWatch | None]] = {}
    while True:
        # Keep every slot busy.
        while len(running) < parallel:
            dialogue = again.popleft() if again else next(new, None)
            if dialogue is None:
                break
            if not dialogue.ask(max_length):
                yield dialogue
                continue
            watch = LoopWatch() if cut_loops else None
            sequence = Sequence(
                dialogue.ids,
                vocabulary,
                sampling(dialogue),
                context=max_length,
                max_tokens=max_new_tokens,
                stop=stop,
                loop_watch=watch,
            )
            scheduler.add(sequence)
            running[sequence] = (dialogue, watch)
        if not running:
            return

        finished = scheduler.step()
        on_tokens(scheduler.n_running + len(finished))
        for sequence in finished:
            dialogue, watch = running.pop(sequence)
            reason = sequence.finish_reason
            assert reason is not None
            kept = sequence.n_new
            if watch is not None and reason == "loop":
                kept = watch.kept
            dialogue.answer(sequence.new_tokens[:kept], reason)
            again.append(dialogue)
