"""The value of a draft source: whether asking it pays, and if not, for how long it is left alone.

A source that costs more than it brings pauses, and is tried again later. Knows no rates and no
trees.
"""

from __future__ import annotations

# Steps in which it was asked, before it is judged: most of what a source brings comes in few. One
# that brings much in a fifth of them shows nothing in 8 in one case of six, in 12 in one of 15.
TRIAL = 12
MEMORY = 48  # of those steps that count, the latest ones
TOKENS = 200.0  # expected ones, of which is known how many came
PRIOR_TOKENS = 20.0  # that count as expected before there were any, and the part of them that came
PRIOR_KEPT = 0.9
# Steps. A trial that takes 8 % of each step costs 1.5 % of the first pause, 0.1 % of the longest.
FIRST_PAUSE = 64
LONGEST_PAUSE = 1024  # steps, over all sequences


class SourceValue:
    """What asking a source was worth for one sequence lately.

    Each pause is twice as long as the one before, until it has paid. shared: the value for all
    sequences: a new one begins where the others are.
    """

    __slots__ = ("_accepted", "_expected", "_gain", "_n", "_shared", "next_pause", "remaining")

    def __init__(self, shared: SourceValue | None = None) -> None:
        self._shared = shared
        self._n = 0
        self._gain = 0.0
        self._expected = PRIOR_TOKENS
        self._accepted = PRIOR_TOKENS * PRIOR_KEPT
        self.remaining: int = 0 if shared is None else shared.remaining
        self.next_pause: int = FIRST_PAUSE if shared is None else shared.next_pause

    @property
    def pausing(self) -> bool:
        """Whether the source is not to be asked."""
        return self.remaining > 0

    @property
    def due_soon(self) -> bool:
        """Whether it may be asked in the next step."""
        return self.remaining <= 1

    def tick(self) -> None:
        """Count one step of a pause."""
        if self.remaining:
            self.remaining -= 1

    def record(self, expected: float, accepted: int, without: float) -> None:
        """Take note of a step in which the source was asked.

        expected: drafted tokens that were to be accepted; accepted: those that were. without:
        tokens that the step's seconds would have brought if it had not been asked. A single step
        says little, and a source promises too much just where it promises much: so it is worth what
        it made expect, times the part of all that was expected lately which came true.
        """
        both = self._shared or self
        both._expected += expected
        both._accepted += accepted
        if both._expected > TOKENS:
            both._accepted *= TOKENS / both._expected
            both._expected = TOKENS
        gain = 1 + expected * both._accepted / both._expected - without
        if self._n == MEMORY:
            self._gain *= (MEMORY - 1) / MEMORY
        else:
            self._n += 1
        self._gain += gain
        if self._n < TRIAL:
            return
        if self._gain > 0:
            self.next_pause = FIRST_PAUSE
        else:
            self.remaining = self.next_pause
            self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)
            self._n = 0
            self._gain = 0.0
        if self._shared is not None:
            self._shared.remaining = self.remaining
            self._shared.next_pause = self.next_pause
