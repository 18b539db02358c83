"""Answers from the GGUF itself: many dialogues at once on one context. Knows neither files nor options."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from model.decoding.batching import Batch
from model.decoding.loops import LoopWatch
from model.decoding.planning import FixedPlan
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.slot import Slot
from model.decoding.step import Base
from model.training.dialogue import Dialogue
from model.training.prompts import Prompt


class Turn:
    """One answer in the making: its slot, and what ends it."""

    def __init__(
        self, dialogue: Dialogue, limit: int, sampling: SamplingParams, eog: frozenset[int], *, cut_loops: bool
    ) -> None:
        self.dialogue = dialogue
        self._eog, self._watch, self._looped = eog, LoopWatch() if cut_loops else None, False
        self.slot = Slot(list(dialogue.ids), limit, Sampler(sampling), self._ends)

    def _ends(self, token: int) -> bool:
        if token in self._eog:
            return True
        self._looped = self._watch is not None and self._watch.feed(token)
        return self._looped

    def finish(self) -> None:
        """Give the dialogue its answer."""
        tokens = self.slot.tokens[self.slot.prompt_length :]
        if self._looped and self._watch:
            self.dialogue.answer(tokens[: self._watch.kept], "loop")
        else:
            self.dialogue.answer(tokens, "stop" if tokens[-1] in self._eog else "length")


def answer_with_base(
    base: Base,
    dialogues: Iterable[Dialogue],
    eog: frozenset[int],
    sampling: Callable[[Prompt, int], SamplingParams],
    *,
    parallel: int,
    max_length: int,
    max_new_tokens: int,
    cut_loops: bool = True,
    tick: Callable[[int], None] = lambda _: None,
) -> Iterator[Dialogue]:
    """Yield the dialogues as they end, answered or with a problem; `parallel` of them are under way.

    base: on an empty cache, with `parallel` sequences of max_length tokens. sampling(prompt, turn): how an answer is
    sampled. tick(n): n tokens were won. An answer's draws hang on its own seed. But kernels round its logits
    differently in other company, so at a near-tie it may read differently there.
    """
    batch = Batch(base, FixedPlan(), places=parallel, cells=parallel * max_length)
    todo, again = iter(dialogues), deque[Dialogue]()  # conversations that go on come before new ones
    turns: dict[int, Turn] = {}
    while True:
        while len(batch) < parallel:
            dialogue = again.popleft() if again else next(todo, None)
            if dialogue is None:
                break
            if not dialogue.ask(max_length):
                yield dialogue
                continue
            limit = min(max_length, len(dialogue.ids) + max_new_tokens)
            turn = Turn(dialogue, limit, sampling(dialogue.prompt, len(dialogue.spans)), eog, cut_loops=cut_loops)
            admitted = batch.admit(turn.slot)
            assert admitted, "a place is free, and there are max_length cells for each"
            turns[id(turn.slot)] = turn
        if not len(batch):
            return
        finished = batch.step()
        tick(batch.running + len(finished))
        for slot in finished:
            turn = turns.pop(id(slot))
            turn.finish()
            again.append(turn.dialogue)
