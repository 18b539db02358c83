"""How the time of a run is shared between writing answers and learning them.

Pure arithmetic on seconds a token, as they were measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds a token: to be written, to be made ready for training, to be learnt once."""

    write_s: float
    prepare_s: float
    learn_s: float

    def __str__(self) -> str:
        rates = [1 / max(each, 1e-9) for each in (self.write_s, self.prepare_s, self.learn_s)]
        return "{:,.0f} tokens/s are written, {:,.0f} made ready, {:,.0f} learnt".format(*rates)


def tokens_to_write(left_s: float, there: int, costs: Costs, passes: int) -> int:
    """Return how many tokens there should be when writing ends, no fewer than are there.

    left_s: seconds for writing the others and for learning all of them `passes` times.
    """
    for_each = costs.write_s + costs.prepare_s + passes * costs.learn_s
    return max(there, int((left_s + there * costs.write_s) / for_each))
