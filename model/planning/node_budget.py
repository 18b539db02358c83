"""The node budget: how many nodes each sequence gets of a step, and from which draft sources.

Pure arithmetic; knows no sequences, no trees and no clock. One sequence and many are served by the
same rule. For each sequence a `NodeBudget` works out its frontier: what it can expect of 0, 1, 2, …
nodes, and how its sources share them. Nodes of all sequences then stand in line by what each adds,
and `allocate` takes those up to where the step earns most tokens per second.

It is called between two decodes, where all caches are cold and every numpy function costs some 5 µs
more than elsewhere: so there are few of them, and what does not change is kept.
"""

from __future__ import annotations

import collections.abc as abc
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Counts = tuple[int, ...]  # by source: how many nodes it drafts

# What drafting must promise, in multiples of plain decoding's speed. Below 1, as only what is
# drafted shows how good it is: in tests/simulation.py 1.0 misses up to a quarter of the speed where
# the curve is too steep beyond what was measured, and wins 1 % where drafts are worth nothing.
MIN_SPEEDUP = 0.98
# Of a source's seconds for one sequence: what each further one takes (the bundled model's heads:
# 0.04).
FURTHER_SEQUENCE = 0.1


class Expectation(NamedTuple):
    """What one source is expected to bring a sequence, by the number of its nodes, from 0 to n.

    tokens: (n + 1,) accepted tokens. missed: (n + 1,) probability that none of the nodes is the
    next token.
    """

    tokens: Float64Array
    missed: Float64Array


class Frontier:
    """What a sequence can expect at best of k = 0 … K nodes.

    tokens: (K + 1,) accepted tokens. seconds: (P, K + 1) of drafting, for each source that takes
    time. source, nodes: the first source, and (K + 1,) its own nodes. behind: the frontier of the
    others, which have the rest of the nodes; None where there is no source at all.
    """

    def __init__(
        self,
        tokens: Float64Array,
        seconds: Float64Array,
        source: int,
        nodes: Int64Array,
        behind: Frontier | None,
        n_sources: int,
    ) -> None:
        self.tokens = tokens
        self.seconds = seconds
        self._source = source
        self._nodes = nodes
        self._behind = behind
        self._n_sources = n_sources
        self._line: Float64Array | None = None

    def counts(self, k: int) -> Counts:
        """Return how many of k nodes each source has."""
        counts = [0] * self._n_sources
        frontier = self
        while frontier._behind is not None:
            own = int(frontier._nodes[k])
            counts[frontier._source] = own
            k -= own
            frontier = frontier._behind
        return tuple(counts)

    def favoured(self, factor: float) -> Frontier:
        """Return the frontier of drafts that count for more than they promise, to be tried."""
        tokens = factor * (1 + self.tokens) - 1
        tokens[0] = 0.0
        return Frontier(
            tokens, self.seconds, self._source, self._nodes, self._behind, self._n_sources
        )

    def line(self) -> Float64Array:
        """Return (2 + 2P, K), a column for each node.

        Its rows: the node's priority; what it adds; for each source that takes time, the seconds of
        drafting with it; for each, whether the source begins (1) or ends (-1) with it. Priorities
        fall, as no node may stand before those that it builds upon.
        """
        if self._line is None:
            gains = self.tokens[1:] - self.tokens[:-1]
            used = np.where(self.seconds > 0, 1.0, 0.0)
            rows = [np.minimum.accumulate(gains), gains, *self.seconds[:, 1:]]
            self._line = np.array([*rows, *(used[:, 1:] - used[:, :-1])])
        return self._line


class Allocation(NamedTuple):
    """What a step should draft, and what it is expected to earn.

    counts: for each sequence the nodes of each source.
    """

    counts: list[Counts]
    tokens_per_second: float


class NodeBudget:
    """Shares out nodes among sources and sequences.

    draft_seconds: by source, by the number of its nodes; None for a source that takes no time.
    room: nodes of one sequence at the most.
    """

    def __init__(self, draft_seconds: abc.Sequence[Float64Array | None], room: int) -> None:
        self._n_sources = len(draft_seconds)
        self._room = room
        timed = [i for i, seconds in enumerate(draft_seconds) if seconds is not None]
        self._seconds: list[Float64Array | None] = []  # by source: (P, n + 1), a row of it its own
        for source, seconds in enumerate(draft_seconds):
            if seconds is None:
                self._seconds.append(None)
            else:
                rows = np.zeros((len(timed), len(seconds)))
                rows[timed.index(source)] = seconds
                self._seconds.append(rows)
        self._no_seconds = np.zeros((len(timed), room + 1))
        self._upwards = np.arange(room + 1)
        self._nothing = Frontier(
            np.zeros(1), self._no_seconds[:, :1], 0, self._upwards[:1], None, self._n_sources
        )

    def frontier(self, expectations: abc.Sequence[Expectation | None]) -> Frontier:
        """Return the frontier of a sequence.

        expectations: by source, those first whose tokens the others' are held against; None for one
        that cannot draft now. A source with n nodes, and k - n nodes for those behind it, are
        expected to bring

            tokens[n] + missed[n] · behind[k - n]

        where the one before has the next token, the others' nodes elsewhere in the tree are of no
        use. The best n is found exactly, for every k.
        """
        frontier = self._nothing
        for source in reversed(range(self._n_sources)):
            expectation = expectations[source]
            if expectation is None:
                continue
            if frontier is self._nothing:
                frontier = self._first(source, expectation)
            else:
                frontier = self._before(source, expectation, frontier)
        return frontier

    def _first(self, source: int, expectation: Expectation) -> Frontier:
        """Return the frontier of a source that has all nodes."""
        size = min(len(expectation.tokens), self._room + 1)
        seconds = self._seconds[source]
        if seconds is None:
            seconds = self._no_seconds
        return Frontier(
            expectation.tokens[:size],
            seconds[:, :size],
            source,
            self._upwards[:size],
            self._nothing,
            self._n_sources,
        )

    def _before(self, source: int, expectation: Expectation, behind: Frontier) -> Frontier:
        """Return the frontier of a source that comes before others."""
        left, outside = _splits(len(expectation.tokens) - 1, len(behind.tokens) - 1, self._room)
        values = behind.tokens[left]
        values *= expectation.missed
        values += expectation.tokens
        values += outside
        nodes = values.argmax(1)
        k = self._upwards[: len(nodes)]
        seconds = behind.seconds[:, k - nodes]
        own_seconds = self._seconds[source]
        if own_seconds is not None:
            seconds += own_seconds[:, nodes]
        return Frontier(values[k, nodes], seconds, source, nodes, behind, self._n_sources)


@lru_cache(maxsize=256)
def _splits(n_max: int, behind_max: int, room: int) -> tuple[Int64Array, Float64Array]:
    """Return for k nodes, n of them a source's own, how many are left for the others.

    And with it 0, or -inf where that cannot be. Both are (K + 1, n_max + 1), with K the nodes that
    there can be in all.
    """
    k = np.arange(min(n_max + behind_max, room) + 1)[:, None]
    left = k - np.arange(n_max + 1)
    possible = (left >= 0) & (left <= behind_max)
    return np.where(possible, left, 0), np.where(possible, 0.0, -np.inf)


def allocate(
    menus: abc.Sequence[abc.Sequence[Frontier]],
    step_seconds: Float64Array,
    plain_seconds: float,
) -> Allocation:
    """Return the nodes that earn most tokens per second; none below MIN_SPEEDUP.

    menus: each has a frontier per sequence. A source that takes time may be worth leaving out
    as a whole, so the caller offers menus with and without it. step_seconds: (R,) of 1, 2, …
    rows, the roots included; infinite where not on offer. plain_seconds: of the step without
    drafts.
    """
    n = len(menus[0])
    best = MIN_SPEEDUP * n / plain_seconds
    chosen = menus[0]
    nodes = [0] * n
    for frontiers in menus:
        line = _line_up(frontiers)
        most = min(len(line.tokens), len(step_seconds) - n)
        if not most:
            continue
        seconds = step_seconds[n : n + most] + line.seconds[:most]
        rates = (n + line.tokens[:most]) / seconds
        at = int(rates.argmax())
        if rates[at] > best:
            best = float(rates[at])
            chosen = frontiers
            nodes = line.nodes_of_each(frontiers, at + 1)
    counts = [frontier.counts(k) for frontier, k in zip(chosen, nodes, strict=True)]
    return Allocation(counts, best)


class _Line(NamedTuple):
    """The nodes of all sequences in the order in which they get their places.

    tokens: (M,) that the first 1, 2, … of them are expected to bring. seconds: (M,) of drafting
    them. order: (M,) where each was when the sequences' nodes lay one behind the other.
    """

    tokens: Float64Array
    seconds: Float64Array
    order: Int64Array | None  # None: as they lay

    def nodes_of_each(self, frontiers: abc.Sequence[Frontier], n_nodes: int) -> list[int]:
        """Return how many of the first n_nodes belong to each sequence."""
        if self.order is None:
            return [n_nodes]
        ends = np.cumsum([len(frontier.tokens) - 1 for frontier in frontiers])
        owners = ends.searchsorted(self.order[:n_nodes], side="right")
        nodes: list[int] = np.bincount(owners, minlength=len(frontiers)).tolist()
        return nodes


def _line_up(frontiers: abc.Sequence[Frontier]) -> _Line:
    """Put the nodes of all sequences in line; those of one sequence are in line already."""
    if len(frontiers) == 1:
        alone = frontiers[0]
        seconds = alone.seconds[:, 1:]
        return _Line(alone.tokens[1:], seconds[0] if len(seconds) == 1 else seconds.sum(0), None)

    columns = np.concatenate([frontier.line() for frontier in frontiers], axis=1)
    order = (-columns[0]).argsort(kind="stable")
    columns = columns[:, order]
    tokens = columns[1].cumsum()
    if not columns[2:].any():  # nothing that takes time is on this menu
        return _Line(tokens, np.zeros(len(tokens)), order)

    # A source drafts for all sequences at once, as deep as the deepest tree asks for.
    timed = (len(columns) - 2) // 2
    longest = np.maximum.accumulate(columns[2 : 2 + timed], axis=1)
    users = columns[2 + timed :].cumsum(1)
    seconds = np.where(users > 0, longest * (1 + FURTHER_SEQUENCE * (users - 1)), 0.0)
    return _Line(tokens, seconds.sum(0), order)
