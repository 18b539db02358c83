"""The likeliest tokens of logits: what nodes behind a token are made of. Plain numpy."""

from __future__ import annotations

from math import exp

import numpy as np
import numpy.typing as npt

KEPT = 4  # tokens, at the most
WITHIN = 3.0  # nats below the likeliest: what is less likely is left out


def likeliest(logits: npt.NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """Return up to KEPT tokens of logits (V,), best first, and their probabilities.

    These are shares of what lies WITHIN the likeliest: a little too high, and exponentials of the
    whole vocabulary would take ten times as long. Who uses them sees how often they hold.
    """
    top = logits.max()
    ids = (logits > top - WITHIN).nonzero()[0]
    values = logits[ids].tolist()
    pairs = sorted(zip(values, ids.tolist(), strict=True), reverse=True)
    best = pairs[0][0]
    total = sum([exp(value - best) for value in values])
    return [token for _, token in pairs[:KEPT]], [
        exp(value - best) / total for value, _ in pairs[:KEPT]
    ]
