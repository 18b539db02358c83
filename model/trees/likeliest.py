"""The likeliest tokens of logits: what nodes behind a token are made of. Plain numpy."""

from __future__ import annotations

from math import exp

import numpy as np
import numpy.typing as npt

KEPT = 4  # tokens, at the most
WITHIN = 3.0  # nats below the likeliest: what is less likely is left out


def likeliest(logits: npt.NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """Return up to KEPT tokens of logits (V,), best first, and their probabilities; or none.

    These are shares of what lies WITHIN the likeliest: a little too high, and exponentials of the
    whole vocabulary would take ten times as long. Who uses them sees how often they hold.
    """
    top = logits.max()
    ids = (logits > top - WITHIN).nonzero()[0]
    if not len(ids):  # logits that are no numbers
        return [], []
    near = logits[ids]
    total = float(np.exp(near - top).sum())
    if len(ids) > KEPT:
        best = np.argpartition(near, -KEPT)[-KEPT:]
        ids = ids[best]
        near = near[best]
    pairs = sorted(zip(near.tolist(), ids.tolist(), strict=True), reverse=True)
    highest = pairs[0][0]
    tokens = [token for _, token in pairs]
    return tokens, [exp(value - highest) / total for value, _ in pairs]
