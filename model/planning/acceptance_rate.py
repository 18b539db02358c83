"""An acceptance rate: which share of drafted tokens is accepted, from a prior and what was seen.

Knows neither what was drafted nor by whom.
"""

from __future__ import annotations

# Tries that the prior counts for. In tests/simulation.py 1 is as good, on the whole; 4 loses 1 to
# 2 % with heads that are worth nothing and wins half a percent with good ones.
PRIOR_WEIGHT = 2.0
# Of what was seen, per look at what pays: what a sequence is about changes. In tests/simulation.py
# 0.8 is as good, and 0.95 loses 5 % more where a sequence turns.
DECAY = 0.9


class AcceptanceRate:
    """Starts at a prior and follows what is recorded.

    It may also be a ratio: the accepted tokens to those that another estimate expects. The prior is
    then 1, and each try counts as much as that estimate expects of it.
    """

    __slots__ = ("accepted", "prior", "tries")

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.tries = 0.0
        self.accepted = 0.0

    def record(self, accepted: bool, tries: float = 1.0) -> None:
        """Take note of one drafted token. tries: what it counts for; other than 1 for a ratio."""
        self.tries += tries
        if accepted:
            self.accepted += 1.0

    def decay(self, factor: float = DECAY) -> None:
        """Let what was seen count for less."""
        self.tries *= factor
        self.accepted *= factor

    @property
    def mean(self) -> float:
        """The estimate: what was accepted of the tries, the prior's included."""
        return (self.accepted + PRIOR_WEIGHT * self.prior) / (self.tries + PRIOR_WEIGHT)
