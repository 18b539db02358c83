"""What passes take: as the curve says, corrected by what they took lately. Knows neither texts nor trees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.trees.costs import CostCurve

Float64Array = npt.NDArray[np.float64]
PLAIN_FIRST = 2  # passes without drafts, of which the faster one counts, to see what the others are held against
PLAIN_EVERY = 48  # passes with drafts, then one without, or nobody would notice that those have become cheap
LATELY = 0.2  # of the newest pass's time in what is known of the others
FORGET = 0.02  # of what drafted passes took, per pass without: what is not tried is given another chance
SPIKE = 8.0  # a pass's time counts as so many times the predicted one at the most
STRIDE = 8  # beyond the sizes that were measured, passes of multiples of this are on offer
SPAN = 64  # tokens of context that count as the same


class Clock:
    """The times of one context's passes.

    curve: seconds of a step but for the heads, by rows. most_rows: of a pass, the roots included, which are fewer.
    """

    def __init__(self, curve: CostCurve, most_rows: int) -> None:
        self.curve, self._most = curve, max(most_rows, curve.sizes[-1])
        self._known: dict[int, tuple[Float64Array, Float64Array]] = {}
        # by the bits of the number of roots: measured by predicted seconds, plain and drafted, and plain passes seen
        self._drifts: dict[int, list[float]] = {}
        self._roots, self._context, self._since_plain = 1, 0, 0

    def begin(self, roots: int, context: int) -> bool:
        """Take note of the next pass's texts and of their tokens; say whether it should go without drafts."""
        self._roots, self._context = roots, context
        return self._since_plain >= PLAIN_EVERY or self._drift(roots)[2] < PLAIN_FIRST

    def note(self, rows: int, took: float) -> None:
        """Take note of the seconds of the pass that has begun last."""
        drift, drafted = self._drift(self._roots), rows > self._roots
        ratio = took / float(self.seconds(self._context)[0][min(rows, self._most) - 1])
        ratio = min(max(ratio, 1 / SPIKE), SPIKE)
        if not drafted and drift[2] < PLAIN_FIRST:
            drift[0], drift[2] = min(drift[0] or ratio, ratio), drift[2] + 1
        else:
            drift[drafted] += LATELY * (ratio - drift[drafted]) if drift[drafted] else ratio
        self._since_plain = self._since_plain + 1 if drafted else 0
        if drift[1] and not drafted:
            drift[1] += FORGET * (drift[0] - drift[1])

    def drift(self, roots: int) -> tuple[float, float]:
        """Return what the curve is to be multiplied by for passes of so many texts, without drafts and with them."""
        plain, drafted, _ = self._drift(roots)
        return plain or drafted or 1.0, drafted or plain or 1.0

    def _drift(self, roots: int) -> list[float]:
        return self._drifts.setdefault(roots.bit_length(), [0.0, 0.0, 0])

    def seconds(self, context: int) -> tuple[Float64Array, Float64Array]:
        """Return (most_rows,) seconds of 1, 2, … rows, guesses included; and those on offer, the others infinite.

        Beyond what was measured a row costs what it cost on average: a single flat stretch must not make many free.
        """
        about = context // SPAN
        if about not in self._known:
            if len(self._known) >= SPAN:
                self._known.clear()
            curve, last = self.curve, self.curve.sizes[-1]
            every, offered = curve.row(about * SPAN, self._most), curve.on_offer(about * SPAN, self._most)
            mean = (every[last - 1] - every[0]) / (last - 1)
            every[last:] = every[last - 1] + np.arange(1, len(every) - last + 1) * mean
            far = np.arange(last + STRIDE - last % STRIDE, len(every) + 1, STRIDE)
            offered[far - 1] = every[far - 1]
            self._known[about] = every, offered
        return self._known[about]
