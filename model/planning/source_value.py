"""The value of a draft source: whether asking it pays, and if not, for how long it is left alone.

A source that costs more than it brings pauses, and is tried again later. Knows no rates and no
trees.
"""

from __future__ import annotations

# Steps in which it was asked, before it is judged: most of what a source brings comes in few. One
# that brings much in a fifth of them shows nothing in 8 in one case of six, in 12 in one of 15.
TRIAL = 12
LEARNING_TRIAL = 256  # for a source that knows nothing before it has seen some text
MEMORY = 4  # trials that count, the latest ones
TOKENS = 200.0  # expected ones, of which is known how many came
PRIOR_TOKENS = 20.0  # that count as expected before there were any, and the part of them that came
PRIOR_KEPT = 0.9
# Trials that a pause is as long as: one that takes 8 % of each step costs 1.3 % of the time at
# first, and 0.1 % at last.
FIRST_PAUSE = 5
LONGEST_PAUSE = 80


class SourceValue:
    """What asking a source was worth lately, for one sequence or for all.

    Each pause is twice as long as the one before, until it has paid. shared: the value for all
    sequences: that of a new one begins where the others are. trial: steps before it is judged.
    """

    __slots__ = (
        "_accepted",
        "_expected",
        "_gain",
        "_n",
        "_shared",
        "_trial",
        "next_pause",
        "remaining",
    )

    def __init__(self, shared: SourceValue | None = None, *, trial: int = TRIAL) -> None:
        self._shared = shared
        self._trial = trial
        # A trial goes on from one sequence to the next: short ones would never end one.
        self._n: int = 0 if shared is None else shared._n
        self._gain: float = 0.0 if shared is None else shared._gain
        self._expected = PRIOR_TOKENS
        self._accepted = PRIOR_TOKENS * PRIOR_KEPT
        self.remaining: int = 0 if shared is None else shared.remaining
        self.next_pause: int = FIRST_PAUSE * trial if shared is None else shared.next_pause

    @property
    def pausing(self) -> bool:
        """Whether the source is not to be asked."""
        return self.remaining > 0

    @property
    def due_soon(self) -> bool:
        """Whether it may be asked in the next step."""
        return self.remaining <= 1

    def tick(self, steps: int = 1) -> None:
        """Count steps of a pause."""
        self.remaining = max(0, self.remaining - steps)

    def record(self, expected: float, accepted: int, without: float, cost: float) -> None:
        """Take note of a step in which the source was asked.

        expected: drafted tokens that were to be accepted; accepted: those that were; without: those
        that were to be accepted if it had not been asked. cost: what was spent for it, in tokens. A
        single step says little, and a source promises too much just where it promises much: so it
        is worth what it made expect, times the part of all that was expected lately which came
        true.
        """
        both = self._shared or self
        both._expected += expected
        both._accepted += accepted
        if both._expected > TOKENS:
            both._accepted *= TOKENS / both._expected
            both._expected = TOKENS
        gain = (expected - without) * both._accepted / both._expected - cost
        most = MEMORY * self._trial
        if self._n == most:
            self._gain *= (most - 1) / most
        else:
            self._n += 1
        self._gain += gain
        if self._n >= self._trial:
            self._judge()
        if self._shared is not None:
            self._shared._n = self._n
            self._shared._gain = self._gain
            self._shared.remaining = self.remaining
            self._shared.next_pause = self.next_pause

    def _judge(self) -> None:
        """Go on where it has paid, else pause."""
        if self._gain > 0:
            self.next_pause = FIRST_PAUSE * self._trial
            return
        self.remaining = self.next_pause
        self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE * self._trial)
        self._n = 0
        self._gain = 0.0
