"""Answers from the base model itself: many dialogues at once on one context.

Knows neither files nor options.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from model.decoding.draft_policy import FixedPolicy
from model.decoding.loops import LoopWatch
from model.decoding.sampling import SamplingParams
from model.decoding.scheduler import Scheduler
from model.decoding.sequence import Sequence, Vocabulary
from model.decoding.step import Base
from model.training.data.prompts import Prompt
from model.training.distillation.dialogue import Dialogue


def answer_with_base(
    base: Base,
    dialogues: Iterable[Dialogue],
    vocabulary: Vocabulary,
    sampling: Callable[[Prompt, int], SamplingParams],
    *,
    parallel: int,
    max_length: int,
    max_new_tokens: int,
    cut_loops: bool = True,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Iterator[Dialogue]:
    """Yield the dialogues as they end, answered or with a problem, `parallel` at a time.

    base: on an empty cache, with `parallel` sequence ids of max_length tokens. sampling(prompt,
    turn): how an answer is sampled. on_tokens(n): n tokens were generated. An answer's draws depend
    on its own seed alone. But kernels round its logits differently in other company, so at a
    near-tie it may read differently there.
    """
    scheduler = Scheduler(base, FixedPolicy(), max_running=parallel, n_cells=parallel * max_length)
    new = iter(dialogues)
    again = deque[Dialogue]()  # conversations that go on come before new ones
    running: dict[Sequence, tuple[Dialogue, LoopWatch | None]] = {}
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
                sampling(dialogue.prompt, len(dialogue.spans)),
                context=max_length,
                max_tokens=max_new_tokens,
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
