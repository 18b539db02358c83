"""What a batch of n tokens costs on this machine, for this file: measured, interpolated, kept as JSON.

Knows no model: the caller hands in a function that decodes one batch and says how long it took.

t(n) is not monotone and is taken as it was measured. Repacked types such as Q4_0 have their fast kernel at multiples of
4 only: t(4) may lie below t(3) (1.62 and 2.28 × t(1), 1 B parameters on two AVX-512 cores), and smoothing would hide
just the sizes that pay. Between measured sizes the curve is a straight line, hence a guess.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # tokens per batch that are measured
MIN_ROUNDS = 3  # the fewest from which a median can drop a spike
LONGEST_S = 1e6  # a stored batch that took longer (11 days) is damage


@dataclass(frozen=True)
class CostCurve:
    """Seconds per batch, by tokens in the batch and tokens in the cache.

    contexts: (C,) tokens in the cache, ascending, one at least. sizes: (S,) tokens per batch, ascending, from 1 on,
    two at least. seconds: C rows of S times.
    """

    contexts: tuple[int, ...]
    sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        assert _sound(self.contexts, self.sizes, self.seconds), f"not a cost curve: {self}"

    @cached_property
    def _by_size(self) -> FloatArray:
        """(S, C) seconds."""
        return np.array(self.seconds, np.float64).T

    def seconds_for(self, n: float, context: float) -> float:
        """Return the seconds of a batch of n tokens over `context` cached ones: bilinear between what was measured.

        Below the first size or context the first one holds. Beyond the last, the line through the last two goes
        on, level where it would fall: noise must not make a long context free. A single context holds for all.
        """
        return float(_line(self.contexts, _line(self.sizes, self._by_size, n), context))

    def row(self, context: float, n_max: int) -> FloatArray:
        """Return (n_max,) seconds for n = 1 … n_max at one context; cheap enough to ask now and then while decoding."""
        return np.array(_line(self.contexts, _all_sizes(self, n_max), context))

    def on_offer(self, context: float, n_max: int) -> FloatArray:
        """Return `row`, infinite for sizes that were not measured: between 12 and 16 a guess would be far too low."""
        row = np.full(n_max, np.inf)
        at = [n - 1 for n in self.sizes if n <= n_max]
        row[at] = self.row(context, n_max)[at]
        return row

    def ratio(self, n: float, context: float) -> float:
        """Return t(n) / t(1)."""
        return self.seconds_for(n, context) / self.seconds_for(1, context)

    def to_json(self) -> dict[str, Any]:
        """Return lists and numbers that `json.dumps` takes."""
        return {
            "contexts": [int(c) for c in self.contexts],
            "sizes": [int(n) for n in self.sizes],
            "seconds": [[float(s) for s in row] for row in self.seconds],
        }

    @classmethod
    def from_json(cls, data: Any) -> CostCurve | None:
        """Return the curve that `to_json` wrote, or None for anything else: then it is measured again.

        Refused are other keys, wrong types and lengths, unsorted sizes or contexts, and times that are not positive
        and finite.
        """
        if not isinstance(data, dict) or data.keys() != {"contexts", "sizes", "seconds"}:
            return None
        contexts, sizes, seconds = data["contexts"], data["sizes"], data["seconds"]
        if not _sound(contexts, sizes, seconds):
            return None
        return cls(tuple(contexts), tuple(sizes), tuple(tuple(float(s) for s in row) for row in seconds))


def measure_curve(
    run: Callable[[int, int], float],
    sizes: Sequence[int],
    contexts: Sequence[int],
    *,
    budget_s: float,
    clock: Callable[[], float] = perf_counter,
) -> CostCurve:
    """Time batches of all sizes at all contexts; keep medians.

    run(n, context) decodes one batch of n tokens over `context` cached ones and returns its seconds. Contexts come
    one after another, as changing them costs the caller a prefill. At each, whole rounds over all sizes alternate,
    every other one backwards. Right before each batch one of a single token is timed, and what is kept is the median
    of the ratios, times the median of the single tokens: a machine that is slow for seconds slows both.

    budget_s: seconds for everything by `clock`, what `run` does besides its batch included; each context has an
    equal share of it. Rounds go on as long as another fits; 3 are made in any case: a median of fewer keeps its spikes.
    """
    assert _ascending(sizes, 1) and sizes[0] == 1 and _ascending(contexts, 0), f"sizes {sizes}, contexts {contexts}"
    share = budget_s / len(contexts)
    rows = [_measure_row(run, sizes, context, share, clock) for context in contexts]
    return CostCurve(tuple(contexts), tuple(sizes), tuple(rows))


def _measure_row(
    run: Callable[[int, int], float], sizes: Sequence[int], context: int, budget_s: float, clock: Callable[[], float]
) -> tuple[float, ...]:
    ones, ratios = list[float](), {n: list[float]() for n in sizes[1:]}
    start, rounds = clock(), 0
    while True:
        before = clock()
        for n in sizes[1:] if rounds % 2 == 0 else sizes[:0:-1]:
            ones.append(run(1, context))
            ratios[n].append(run(n, context) / ones[-1])
        rounds += 1
        if rounds >= MIN_ROUNDS and 2 * clock() - before - start > budget_s:  # another one like this
            one = float(median(ones))
            return (one, *(one * float(median(each)) for each in ratios.values()))


def _line(xs: Sequence[int], ys: FloatArray, x: float) -> FloatArray:
    """Interpolate ys (X, …) at x; ys[0] below the first x; beyond the last, its slope or none where it falls."""
    if x <= xs[0] or len(xs) == 1:
        first: FloatArray = ys[0]
        return first
    i = min(bisect_left(xs, x), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    if x > xs[-1]:
        slope = np.maximum(slope, 0.0)
    value: FloatArray = ys[i] + slope * (x - xs[i])
    return value


@lru_cache(maxsize=16)
def _all_sizes(curve: CostCurve, n_max: int) -> FloatArray:
    """(C, n_max) seconds for n = 1 … n_max at the measured contexts."""
    return np.stack([_line(curve.sizes, curve._by_size, n) for n in range(1, n_max + 1)], axis=1)


def _ascending(numbers: Any, first: int) -> bool:
    """Whether these are whole numbers, each greater than the one before, none below `first`."""
    if not isinstance(numbers, (list, tuple)) or not numbers:
        return False
    whole = all(isinstance(x, int) and not isinstance(x, bool) and first <= x < 2**31 for x in numbers)
    return whole and all(a < b for a, b in pairwise(numbers))


def _sound(contexts: Any, sizes: Any, seconds: Any) -> bool:
    """Whether these three make a cost curve; they may be of any type."""
    if not (_ascending(contexts, 0) and _ascending(sizes, 1) and sizes[0] == 1 and len(sizes) > 1):
        return False
    if not isinstance(seconds, (list, tuple)) or len(seconds) != len(contexts):
        return False
    if not all(isinstance(row, (list, tuple)) and len(row) == len(sizes) for row in seconds):
        return False
    numbers = all(isinstance(s, (int, float)) and not isinstance(s, bool) for row in seconds for s in row)
    return numbers and all(0 < s < LONGEST_S for row in seconds for s in row)  # NaN is neither
