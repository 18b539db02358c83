"""An acceptance rate: which share of drafted tokens is accepted, from a prior and what was seen.

Knows neither what was drafted nor by whom.
"""

from __future__ import annotations

# Tries that the prior counts for. In tests/simulation.py 1 is as good, on the whole; 4 loses 1 to
# 2 % with heads that are worth nothing and wins half a percent with good ones.
PRIOR_WEIGHT = 2.0
# The same for a prior that other sequences have shown. On answers of SmolLM2-135M, in simulated
# time, 2 and 8 are as good; in tests/simulation.py 8 is slow where a sequence is unlike the others.
SHARED_WEIGHT = 4.0
# Of what was seen, per look at what pays: what a sequence is about changes. In tests/simulation.py
# 0.8 is as good, and 0.95 loses 5 % more where a sequence turns.
DECAY = 0.9
# Tries of all sequences that are remembered, the latest ones. With 50 heads that have become good
# are found later, with 16 n-grams earn 1 % less on answers of SmolLM2-135M.
MEMORY = 25.0


class AcceptanceRate:
    """Starts at a prior and follows what is recorded.

    prior: a number, or the rate of all sequences, which learns what is recorded here. A rate may
    also be a ratio: the accepted tokens to those that another estimate expects. The prior is then
    1, and each try counts as much as that estimate expects of it.
    """

    __slots__ = ("_prior", "accepted", "tries")

    def __init__(self, prior: float | AcceptanceRate) -> None:
        self._prior = prior
        self.tries = 0.0
        self.accepted = 0.0

    def record(self, accepted: bool, tries: float = 1.0) -> None:
        """Take note of one drafted token. tries: what it counts for; other than 1 for a ratio."""
        self.tries += tries
        if accepted:
            self.accepted += 1.0
        if isinstance(self._prior, AcceptanceRate):
            self._prior.record(accepted, tries)
            if self._prior.tries > MEMORY:
                self._prior.decay()

    def decay(self, factor: float = DECAY) -> None:
        """Let what was seen count for less."""
        self.tries *= factor
        self.accepted *= factor

    def forget(self, factor: float) -> None:
        """Let what was seen count for less, here and of all sequences."""
        self.decay(factor)
        if isinstance(self._prior, AcceptanceRate):
            self._prior.decay(factor)

    @property
    def prior(self) -> float:
        """The estimate before anything was seen."""
        if isinstance(self._prior, AcceptanceRate):
            return self._prior.mean
        return self._prior

    @property
    def mean(self) -> float:
        """The estimate: what was accepted of the tries, the prior's included."""
        weight = SHARED_WEIGHT if isinstance(self._prior, AcceptanceRate) else PRIOR_WEIGHT
        return (self.accepted + weight * self.prior) / (self.tries + weight)
