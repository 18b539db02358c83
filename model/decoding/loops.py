"""Loops: how much of a sequence stood in it before, and where it only repeats itself.

Knows ids only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

GRAM = 8  # tokens: as few as make a chance repeat rare
LOOP = 64  # tokens in a row that end an 8-gram which stood there before: nothing new comes any more


class LoopWatch:
    """Follows one sequence token by token.

    It loops when each of its last 64 8-grams had stood in it before. repeated, total: its 8-grams.
    kept: what is left of a looping sequence, which ends with the last 8-gram that was new: one
    whole turn of the loop and seven tokens of the next.
    """

    def __init__(self) -> None:
        self.repeated = 0
        self.total = 0
        self._length = 0
        self._run = 0
        self._last: deque[int] = deque(maxlen=GRAM)
        self._seen: set[tuple[int, ...]] = set()

    def add(self, token: int) -> bool:
        """Take the next token; say whether the sequence loops."""
        self._last.append(token)
        self._length += 1
        if self._length < GRAM:
            return False
        gram = tuple(self._last)
        known = gram in self._seen
        self._seen.add(gram)
        self.total += 1
        self.repeated += known
        self._run = self._run + 1 if known else 0
        return self._run >= LOOP

    @property
    def kept(self) -> int:
        """How many tokens there are up to the end of the last new 8-gram."""
        return self._length - self._run


def without_loop(tokens: list[int]) -> tuple[list[int], bool]:
    """Return a sequence up to where it begins to loop, and whether it does."""
    watch = LoopWatch()
    for token in tokens:
        if watch.add(token):
            return tokens[: watch.kept], True
    return tokens, False


def count_repeats(sequences: Iterable[Iterable[int]]) -> tuple[int, int]:
    """Return how many 8-grams stood in the same sequence before, and how many there are."""
    repeated = 0
    total = 0
    for tokens in sequences:
        watch = LoopWatch()
        for token in tokens:
            watch.add(token)
        repeated += watch.repeated
        total += watch.total
    return repeated, total
