"""Acceptance rates: how often guesses of a kind are right, from a prior and from what was seen.

Knows neither what was guessed nor by whom.
"""

from __future__ import annotations

import collections.abc as abc
from math import sqrt

# Tries that count at the most, of all sequences and of one: what they are about changes.
SHARED_MEMORY = 200.0
OWN_MEMORY = 48.0
PRIOR_WEIGHT = 10.0  # tries that what is known beforehand counts for
CAUTION = 0.5  # standard errors


class AcceptanceRate:
    """Starts at a prior and follows what is recorded.

    prior: a number, or the rate of all sequences, which learns what is recorded here. memory: tries
    that count, the latest ones.
    """

    __slots__ = ("_memory", "_prior", "accepted", "tries")

    def __init__(self, prior: float | AcceptanceRate, memory: float = SHARED_MEMORY) -> None:
        self._prior = prior
        self._memory = memory
        self.tries = 0.0
        self.accepted = 0.0

    def record(self, accepted: bool) -> None:
        """Take note of one guess that was held against the base model's choice."""
        if self.tries >= self._memory:
            kept = (self._memory - 1) / self.tries
            self.tries *= kept
            self.accepted *= kept
        self.tries += 1.0
        if accepted:
            self.accepted += 1.0
        if isinstance(self._prior, AcceptanceRate):
            self._prior.record(accepted)

    @property
    def mean(self) -> float:
        """The estimate: what was accepted of the tries, the prior's included."""
        prior = self._prior.mean if isinstance(self._prior, AcceptanceRate) else self._prior
        return (self.accepted + PRIOR_WEIGHT * prior) / (self.tries + PRIOR_WEIGHT)

    @property
    def cautious(self) -> float:
        """The estimate, less what it may be too high by.

        Who drafts picks what looks best, and with it what looks better than it is.
        """
        mean = self.mean
        doubt = sqrt(mean * (1 - mean) / (self.tries + PRIOR_WEIGHT))
        return max(0.0, mean - CAUTION * doubt)


# A guess that stands alone is as good as its kind says, one that another source has too is better,
# and one where the others have others is worse.
ALONE, AGREEING, DISAGREEING = range(3)


class Calibration:
    """The acceptance rates of one draft source over all sequences, by kind of guess.

    Of each kind there are three: guesses that stand alone, agree and disagree with other sources.
    priors: by kind, what is expected before anything was seen.
    """

    def __init__(self, priors: abc.Sequence[float]) -> None:
        self.rates = list[AcceptanceRate]()
        for prior in priors:
            for expected in (prior, 1 - (1 - prior) * 0.5, prior * 0.4):
                self.rates.append(AcceptanceRate(expected))

    def of_sequence(self) -> SequenceCalibration:
        """Return the rates of a new sequence, which begin where all others are."""
        return SequenceCalibration(self.rates)


class SequenceCalibration:
    """The acceptance rates of one draft source for one sequence.

    A probability is worked out once between two records of its kind.
    """

    __slots__ = ("_known", "_own", "_shared")

    def __init__(self, shared: abc.Sequence[AcceptanceRate]) -> None:
        self._shared = shared
        self._own: dict[int, AcceptanceRate] = {}
        self._known: dict[int, float] = {}

    def probability(self, kind: int) -> float:
        """Return how likely a guess of this kind is right.

        kind: three times the source's kind, and ALONE, AGREEING or DISAGREEING.
        """
        known = self._known.get(kind)
        if known is None:
            own = self._own.get(kind)
            known = self._known[kind] = (own or self._shared[kind]).cautious
        return known

    def record(self, kind: int, accepted: bool) -> None:
        """Take note of a guess, for this sequence and for all."""
        own = self._own.get(kind)
        if own is None:
            own = self._own[kind] = AcceptanceRate(self._shared[kind], OWN_MEMORY)
        own.record(accepted)
        self._known.pop(kind, None)
