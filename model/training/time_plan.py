"""How the time of a run is shared between writing answers and learning them.

Pure arithmetic on seconds a token, as they were measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds a token: to be written, to have its state made, to be learnt once.

    start_s: seconds until training begins, however much there is to learn.
    """

    write_s: float
    prepare_s: float
    learn_s: float
    start_s: float = 0.0

    def __str__(self) -> str:
        rates = [1 / max(each, 1e-9) for each in (self.write_s, self.prepare_s, self.learn_s)]
        return "{:,.0f} tokens/s are written, {:,.0f} made ready, {:,.0f} learnt".format(*rates)


def tokens_to_write(left_s: float, there: int, costs: Costs, passes: int) -> int:
    """Return how many tokens there should be when writing ends, no fewer than are there.

    left_s: seconds for writing the others and for learning all of them `passes` times.
    """
    for_each = costs.write_s + costs.prepare_s + passes * costs.learn_s
    return max(there, int((left_s - costs.start_s + there * costs.write_s) / for_each))
