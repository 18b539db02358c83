"""The step-time model: what a step takes, by the cost curve and by what steps took lately.

Knows neither sequences nor trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.trees.costs import CostCurve

# Steps without drafts, of which the faster one counts, to see what drafting is held against.
FIRST_PLAIN_STEPS = 2
# Steps with drafts, then one without, or nobody would notice that those have become cheap.
DRAFTED_IN_A_ROW = 48
SMOOTHING = 0.2  # weight of the newest step among those of its kind
# Part of what drafted steps took that is forgotten per plain step: what is not tried is given
# another chance.
FORGETTING = 0.02
# A step counts as so many times the predicted seconds at the most: a stall is no news.
MAX_DRIFT = 8.0
# Beyond the sizes that were measured, steps of a multiple of this many rows are on offer.
STRIDE = 8
CONTEXT_STRIDE = 64  # tokens in the cache that count as the same
MAX_CONTEXTS = 64  # whose times are kept at hand


@dataclass
class _Drift:
    """How many times the curve's seconds steps took lately, by kind; None where there was none.

    plain_steps: how many there were, counted up to FIRST_PLAIN_STEPS.
    """

    plain: float | None = None
    drafted: float | None = None
    plain_steps: int = 0

    def record(self, ratio: float, drafted: bool) -> None:
        """Take note of one step."""
        if drafted:
            self.drafted = _smoothed(self.drafted, ratio)
            return
        if self.plain_steps < FIRST_PLAIN_STEPS:
            self.plain_steps += 1
            self.plain = ratio if self.plain is None else min(self.plain, ratio)
        else:
            self.plain = _smoothed(self.plain, ratio)
        if self.drafted is not None:
            self.drafted += FORGETTING * (self.plain - self.drafted)

    @property
    def factors(self) -> tuple[float, float]:
        """What to multiply the curve by, without drafts and with them.

        What was not seen yet is taken from the other.
        """
        known = [drift for drift in (self.plain, self.drafted) if drift is not None]
        if not known:
            return 1.0, 1.0
        return known[0], known[-1]


def _smoothed(before: float | None, newest: float) -> float:
    if before is None:
        return newest
    return before + SMOOTHING * (newest - before)


class StepTimeModel:
    """Predicts the seconds of the steps on one context, drafting left out.

    curve: seconds by rows and by tokens in the cache. max_rows: of a step, the roots included; more
    only where the curve has more.
    """

    def __init__(self, curve: CostCurve, max_rows: int) -> None:
        self._curve = curve
        self._max_rows = max(max_rows, curve.sizes[-1])
        self._by_context: dict[int, tuple[list[float], list[tuple[int, float]]]] = {}
        self._offers: dict[tuple[int, int, int, float], list[tuple[int, float]]] = {}
        self._drifts: dict[int, _Drift] = {}  # by the bits of the number of sequences
        self._current = self._drift(1)
        self._n_sequences = 1
        self._n_context = 0
        self._drafted_in_a_row = 0

    def begin_step(self, n_sequences: int, n_context: int) -> None:
        """Take note of the next step: its sequences, and the tokens that they have in all."""
        self._n_sequences = n_sequences
        self._n_context = n_context
        self._current = self._drift(n_sequences)

    @property
    def plain_step_due(self) -> bool:
        """Whether the step that has begun should go without drafts, to see what that takes."""
        if self._drafted_in_a_row >= DRAFTED_IN_A_ROW:
            return True
        return self._current.plain_steps < FIRST_PLAIN_STEPS

    def record(self, n_rows: int, seconds: float) -> None:
        """Take note of what the step that has begun last took."""
        every_size, _ = self._seconds(self._n_context)
        predicted = every_size[min(n_rows, self._max_rows) - 1]
        ratio = min(max(seconds / predicted, 1 / MAX_DRIFT), MAX_DRIFT)
        drafted = n_rows > self._n_sequences
        self._current.record(ratio, drafted)
        self._drafted_in_a_row = self._drafted_in_a_row + 1 if drafted else 0

    def plain_seconds(self, n_sequences: int, n_context: int) -> float:
        """Return the seconds of a step without drafts."""
        every_size, _ = self._seconds(n_context)
        plain, _ = self._drift(n_sequences).factors
        return plain * every_size[n_sequences - 1]

    def offers(self, n_sequences: int, n_context: int, most: int) -> list[tuple[int, float]]:
        """Return rows, up to `most`, and seconds of the drafted steps on offer, ascending.

        Drifts that agree in three digits share one list: it is worked out once.
        """
        _, drafted = self._drift(n_sequences).factors
        key = (n_context // CONTEXT_STRIDE, n_sequences, most, float(f"{drafted:.3g}"))
        known = self._offers.get(key)
        if known is None:
            if len(self._offers) >= MAX_CONTEXTS:
                self._offers.clear()
            _, on_offer = self._seconds(n_context)
            known = self._offers[key] = [
                (rows, drafted * seconds)
                for rows, seconds in on_offer
                if n_sequences < rows <= most
            ]
        return known

    def _drift(self, n_sequences: int) -> _Drift:
        bits = n_sequences.bit_length()
        drift = self._drifts.get(bits)
        if drift is None:
            drift = self._drifts[bits] = _Drift()
        return drift

    def _seconds(self, n_context: int) -> tuple[list[float], list[tuple[int, float]]]:
        """Return the curve's seconds for 1, 2, … rows; and (rows, seconds) of those on offer.

        Beyond what was measured a row costs what it cost on average: one flat stretch must not make
        many free.
        """
        about = n_context // CONTEXT_STRIDE
        kept = self._by_context.get(about)
        if kept is not None:
            return kept
        if len(self._by_context) >= MAX_CONTEXTS:
            self._by_context.clear()
        every_size = self._curve.row(about * CONTEXT_STRIDE, self._max_rows)
        on_offer = self._curve.on_offer(about * CONTEXT_STRIDE, self._max_rows)

        last = self._curve.sizes[-1]
        per_row = max(0.0, (every_size[last - 1] - every_size[0]) / (last - 1))
        every_size[last:] = every_size[last - 1] + per_row * np.arange(1, self._max_rows - last + 1)
        further = np.arange(last + STRIDE - last % STRIDE, self._max_rows + 1, STRIDE) - 1
        on_offer[further] = every_size[further]
        offered = np.flatnonzero(np.isfinite(on_offer)).tolist()
        known = every_size.tolist(), [(at + 1, float(on_offer[at])) for at in offered]
        self._by_context[about] = known
        return known
