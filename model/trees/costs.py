"""The cost curve: what a batch of n tokens costs on this machine, for this file. Knows no model.

It is measured, interpolated and kept as JSON; the caller hands in a function that decodes one batch
and says how long it took.

t(n), the seconds of a batch of n tokens, is not monotone and is taken as it was measured. Repacked
types such as Q4_0 have their fast kernel at multiples of 4 only: t(4) may lie below t(3) (1.62 and
2.28 × t(1), 1 B parameters on two AVX-512 cores), and smoothing would hide just the sizes that pay.
Between measured sizes the curve is a straight line, hence a guess.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from model.trees.slices import Slices, finish, undisturbed

FloatArray = npt.NDArray[np.float64]

# Tokens per batch that are measured.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
MIN_ROUNDS = 3  # the fewest from which a median can drop a spike
LONGEST_S = 1e6  # a stored batch that took longer (11 days) is damage


@dataclass(frozen=True)
class CostCurve:
    """Seconds per batch, by tokens in the batch and tokens in the cache.

    contexts: (C,) tokens in the cache, ascending, one at least.
    sizes: (S,) tokens per batch, ascending, from 1 on, two at least.
    seconds: C rows of S times.
    """

    contexts: tuple[int, ...]
    sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        assert _is_sound(self.contexts, self.sizes, self.seconds), f"not a cost curve: {self}"

    @cached_property
    def _by_size(self) -> FloatArray:
        """(S, C) seconds."""
        return np.array(self.seconds, np.float64).T

    def seconds_for(self, n: float, context: float) -> float:
        """Return the seconds of a batch of n tokens over `context` cached ones.

        Bilinear between what was measured. Below the first size or context the first one holds.
        Beyond the last, the line through the last two goes on, level where it would fall: noise
        must not make a long context free. A single context holds for all.
        """
        at_contexts = _interpolate(self.sizes, self._by_size, n)
        return float(_interpolate(self.contexts, at_contexts, context))

    def row(self, context: float, n_max: int) -> FloatArray:
        """Return (n_max,) seconds for n = 1 … n_max at one context, as `seconds_for` does.

        Cheap enough to ask now and then while decoding.
        """
        return np.array(_interpolate(self.contexts, _all_sizes(self, n_max), context))

    def on_offer(self, context: float, n_max: int) -> FloatArray:
        """Return `row`, but infinity for sizes that were not measured.

        Between 12 and 16 tokens, say, a guess would be far too low.
        """
        offered = np.full(n_max, np.inf)
        measured = [n - 1 for n in self.sizes if n <= n_max]
        offered[measured] = self.row(context, n_max)[measured]
        return offered

    def ratio(self, n: float, context: float) -> float:
        """Return t(n) / t(1)."""
        return self.seconds_for(n, context) / self.seconds_for(1, context)

    def to_json(self) -> dict[str, Any]:
        """Return lists and numbers that `json.dumps` takes."""
        return {
            "contexts": [int(context) for context in self.contexts],
            "sizes": [int(n) for n in self.sizes],
            "seconds": [[float(s) for s in row] for row in self.seconds],
        }

    @classmethod
    def from_json(cls, data: Any) -> CostCurve | None:
        """Return the curve that `to_json` wrote, or None for anything else.

        Refused are other keys, wrong types and lengths, unsorted sizes or contexts, and times that
        are not positive and finite: then the curve is measured again.
        """
        if not isinstance(data, dict) or data.keys() != {"contexts", "sizes", "seconds"}:
            return None
        if not _is_sound(data["contexts"], data["sizes"], data["seconds"]):
            return None
        seconds = tuple(tuple(float(s) for s in row) for row in data["seconds"])
        return cls(tuple(data["contexts"]), tuple(data["sizes"]), seconds)


def measure_curve(
    run: Callable[[int, int], float],
    sizes: Sequence[int],
    contexts: Sequence[int],
    *,
    budget_s: float,
    clock: Callable[[], float] = perf_counter,
) -> CostCurve:
    """Time batches of all sizes at all contexts now; see `curve_in_slices`."""
    assert _is_ascending(sizes, 1) and sizes[0] == 1, f"sizes {sizes}, contexts {contexts}"
    assert _is_ascending(contexts, 0), f"sizes {sizes}, contexts {contexts}"
    return finish(curve_in_slices(run, sizes, contexts, budget_s=budget_s, clock=clock))


def curve_in_slices(
    run: Callable[[int, int], float],
    sizes: Sequence[int],
    contexts: Sequence[int],
    *,
    budget_s: float,
    prepare: Callable[[int], Slices[None]] | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Slices[CostCurve]:
    """Time batches of all sizes at all contexts, a pair of batches in each slice; keep medians.

    run(n, context) decodes one batch of n tokens over `context` cached ones and returns its
    seconds. Contexts come one after another, as changing them costs the caller a prefill. At each,
    whole rounds over all sizes alternate, every other one backwards. Right before each batch one of
    a single token is timed, and what is kept is the median of the ratios, times the median of the
    single tokens: a machine that is slow for seconds slows both.

    budget_s: seconds of all pairs by `clock`, what `run` does besides its batch included; each
    context has an equal share of it. Rounds go on as long as another fits; 3 are made in any case,
    as a median of fewer keeps its spikes. prepare: fills the cache for a context, in slices; None:
    `run` does.
    """
    share_s = budget_s / len(contexts)
    rows = list[tuple[float, ...]]()
    for context in contexts:
        if prepare is not None:
            yield from prepare(context)
        rows.append((yield from _row_in_slices(run, sizes, context, share_s, clock)))
    return CostCurve(tuple(contexts), tuple(sizes), tuple(rows))


def _row_in_slices(
    run: Callable[[int, int], float],
    sizes: Sequence[int],
    context: int,
    budget_s: float,
    clock: Callable[[], float],
) -> Slices[tuple[float, ...]]:
    """Return (S,) seconds at one context."""
    spent_s = 0.0

    def pair(n: int) -> tuple[float, float]:
        """Return the seconds of a single token, and of a batch right behind it."""
        nonlocal spent_s
        began = clock()
        seconds = run(1, context), run(n, context)
        spent_s += clock() - began
        return seconds

    upwards = sizes[1:]
    ones = list[float]()
    ratios: dict[int, list[float]] = {n: [] for n in upwards}
    rounds = 0
    while True:
        before_s = spent_s
        for n in upwards if rounds % 2 == 0 else upwards[::-1]:
            one_s, seconds = yield from undisturbed(partial(pair, n))
            ones.append(one_s)
            ratios[n].append(seconds / one_s)
        rounds += 1
        after_another = spent_s + (spent_s - before_s)
        if rounds >= MIN_ROUNDS and after_another > budget_s:
            break
    one_s = float(median(ones))
    return (one_s, *(one_s * float(median(each)) for each in ratios.values()))


def _interpolate(xs: Sequence[int], ys: FloatArray, x: float) -> FloatArray:
    """Return ys (X, …) at x: ys[0] below the first x; beyond the last, its slope, never a fall."""
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
    columns = [_interpolate(curve.sizes, curve._by_size, n) for n in range(1, n_max + 1)]
    return np.stack(columns, axis=1)


def _is_ascending(numbers: Any, first: int) -> bool:
    """Whether these are whole numbers, each greater than the one before, none below `first`."""
    if not isinstance(numbers, (list, tuple)) or not numbers:
        return False
    if not all(type(x) is int and first <= x < 2**31 for x in numbers):
        return False
    return all(a < b for a, b in pairwise(numbers))


def _is_sound(contexts: Any, sizes: Any, seconds: Any) -> bool:
    """Whether these three make a cost curve; they may be of any type."""
    if not _is_ascending(contexts, 0) or not _is_ascending(sizes, 1):
        return False
    if sizes[0] != 1 or len(sizes) < 2:
        return False
    if not isinstance(seconds, (list, tuple)) or len(seconds) != len(contexts):
        return False
    if not all(isinstance(row, (list, tuple)) and len(row) == len(sizes) for row in seconds):
        return False
    return all(_is_time(s) for row in seconds for s in row)


def _is_time(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value < LONGEST_S  # NaN is neither
