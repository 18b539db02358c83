"""The tree that earns most tokens per second, from rank accuracies and measured times. Knows no model and no clock.

Accuracies: (K, R); [k, r] is the probability that guess r of head k + 1 is right, given that its parent was
accepted. It depends on depth and rank only (Sequoia's positional acceptance, arXiv 2402.12374), so a node's
probability is the product along its path, and the expected tokens of a step are 1 + the sum over all nodes.

A child is never likelier than its parent. So the m likeliest nodes always form a tree, and no tree of m nodes has
a greater sum: growing by the likeliest node (Medusa, arXiv 2401.10774, "optimized tree construction") is exact
here, and Sequoia's dynamic programme, which tests/test_search.py holds against it, finds nothing better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod

import numpy as np
import numpy.typing as npt

from model.errors import UsageError
from model.trees.tree import MAX_LEAVES, RankPath, Tree

FloatArray = npt.NDArray[np.float64]
Ranked = list[list[tuple[float, int]]]  # per head: (accuracy, rank), likeliest first
Growth = list[tuple[float, RankPath]]  # nodes in the order in which they join the tree, with their probabilities


@dataclass(frozen=True)
class Choice:
    """A tree and what it is expected to earn.

    expected_length: tokens per step. seconds: per step, drafting included. speedup: against plain decoding, which
    takes the time of one token and drafts nothing.
    """

    tree: Tree
    expected_length: float
    seconds: float
    tokens_per_s: float
    speedup: float


def grow(accuracies: npt.ArrayLike, n_max: int, *, max_leaves: int = MAX_LEAVES) -> list[RankPath]:
    """Return up to n_max rank paths of which the first m are the best tree of m drafted nodes, for every m.

    accuracies: (K, R). Parents come before their children. Equally likely nodes: the shallower first, then the lower
    ranks. A rank that is likelier than the ones before it comes without them. Nodes of probability 0 are left out,
    and so is what would make more than max_leaves leaves (there the growth is greedy, no longer the optimum).
    Raises UsageError for accuracies that are not (K, R) or not within 0 … 1.
    """
    return [path for _, path in _grow(_ranked(_checked(accuracies)), n_max, max_leaves)]


def expected_lengths(accuracies: npt.ArrayLike, paths: Sequence[RankPath]) -> FloatArray:
    """Return (len(paths) + 1,) tokens per step with the first m = 0, 1, … nodes: 1 + the sum of their probabilities.

    accuracies: (K, R). paths: drafted nodes, parents before their children, without the root.
    Raises UsageError for accuracies as `grow` does, and for a path outside of them.
    """
    table = _checked(accuracies)
    for path in paths:
        if not 0 < len(path) <= len(table) or not all(0 <= r < table.shape[1] for r in path):
            raise UsageError(f"tree: the path {list(path)} is outside of accuracies of shape {table.shape}")
    rows = table.tolist()
    return _lengths([prod(rows[d][r] for d, r in enumerate(path)) for path in paths])


def best_tree(
    accuracies: npt.ArrayLike,
    step_seconds: npt.ArrayLike,
    *,
    draft_seconds: npt.ArrayLike,
    max_nodes: int,
    max_leaves: int = MAX_LEAVES,
) -> Choice:
    """Return the tree with the most expected tokens per second; the root alone where nothing pays.

    accuracies: (K, R). step_seconds: (max_nodes,) or more, the time to verify n = 1, 2, … nodes, the root included;
    infinity keeps a size from being chosen. draft_seconds: a number or (K,), what a step pays for drafting when its
    tree is 1 … K deep, not falling; a step without drafts pays nothing. max_nodes: with the root.
    Every size is tried, with every depth and as a chain. Of equals the smaller tree wins, then the chain,
    then the shallower. Unless max_leaves binds, no tree at all earns more. Raises UsageError as `grow` does.
    """
    plain, best = _sweep(accuracies, step_seconds, draft_seconds, max_nodes, max_leaves)
    return _choice(max(best, key=lambda c: c.rate), plain)


def all_choices(
    accuracies: npt.ArrayLike,
    step_seconds: npt.ArrayLike,
    *,
    draft_seconds: npt.ArrayLike,
    max_nodes: int,
    max_leaves: int = MAX_LEAVES,
) -> list[Choice]:
    """Return the best tree of each size from 1 (the root alone) on, for tables and pictures.

    Takes and raises what `best_tree` does. Sizes are left out where the likely nodes run out, or the time is infinite.
    """
    plain, best = _sweep(accuracies, step_seconds, draft_seconds, max_nodes, max_leaves)
    return [_choice(c, plain) for c in best]


@dataclass(frozen=True)
class _Candidate:
    """The first n - 1 nodes of a growth; no Tree yet, as building one takes longer than judging it."""

    n: int
    growth: Growth
    expected: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.expected / self.seconds


def _sweep(
    accuracies: npt.ArrayLike,
    step_seconds: npt.ArrayLike,
    draft_seconds: npt.ArrayLike,
    max_nodes: int,
    max_leaves: int,
) -> tuple[float, list[_Candidate]]:
    """Return plain decoding's seconds per token, and the best candidate of each size, smallest first."""
    table = _checked(accuracies)
    steps, draft = np.asarray(step_seconds, np.float64), np.asarray(draft_seconds, np.float64)
    assert 0 < max_nodes <= len(steps) and max_leaves > 0, f"{max_nodes} nodes, {len(steps)} times"
    assert bool((steps > 0).all()) and steps[0] < np.inf, "verify times are above 0"
    assert draft.shape in ((), (len(table),)) and bool((draft >= 0).all()), "a drafting time per depth"
    draft = np.broadcast_to(draft, len(table))
    best = {1: _Candidate(1, [], 1.0, float(steps[0]))}
    for growth in _growths(table, max_nodes - 1, max_leaves):
        depths = np.maximum.accumulate([len(path) for _, path in growth])
        seconds = (steps[1 : len(growth) + 1] + draft[depths - 1]).tolist()
        for n, (expected, s) in enumerate(zip(_lengths([p for p, _ in growth])[1:].tolist(), seconds, strict=True), 2):
            if s < np.inf and (n not in best or expected / s > best[n].rate):
                best[n] = _Candidate(n, growth, expected, s)
    return float(steps[0]), [best[n] for n in sorted(best)]


def _growths(table: FloatArray, n_max: int, max_leaves: int) -> list[Growth]:
    """Return the chain of first guesses and a greedy growth for each depth (drafting costs by depth); none is empty."""
    chain, p = Growth(), 1.0
    for depth, accuracy in enumerate(table[:n_max, :1].ravel().tolist(), 1):
        p *= accuracy
        if p == 0:
            break
        chain.append((p, (0,) * depth))
    ranked = _ranked(table)
    grown = [_grow(ranked[:depth], n_max, max_leaves) for depth in range(1, len(ranked) + 1)]
    return [growth for growth in (chain, *grown) if growth]


def _grow(ranked: Ranked, n_max: int, max_leaves: int) -> Growth:
    """Take the likeliest node that may hang under the tree, n_max times; only its next sibling and first child join."""
    grown, leaves = Growth(), 1
    heap: list[tuple[float, int, RankPath, int, float]] = []  # -probability, depth, path, place, parent's probability

    def offer(parent: RankPath, parent_p: float, place: int) -> None:
        depth = len(parent)
        if depth < len(ranked) and place < len(ranked[depth]):
            accuracy, rank = ranked[depth][place]
            if accuracy * parent_p > 0:
                heappush(heap, (-accuracy * parent_p, depth + 1, (*parent, rank), place, parent_p))

    offer((), 1.0, 0)
    while heap and len(grown) < n_max:
        minus_p, _, path, place, parent_p = heappop(heap)
        if place > 0 and leaves == max_leaves:  # a first child takes its parent's lane, a sibling needs one more
            continue
        leaves += place > 0
        grown.append((-minus_p, path))
        offer(path, -minus_p, 0)
        offer(path[:-1], parent_p, place + 1)
    return grown


def _ranked(table: FloatArray) -> Ranked:
    return [sorted(((a, r) for r, a in enumerate(row)), key=lambda pair: -pair[0]) for row in table.tolist()]


def _lengths(probabilities: list[float]) -> FloatArray:
    """(M + 1,): 1 + the sum of the first m probabilities."""
    return np.cumsum([1.0, *probabilities])


def _choice(c: _Candidate, plain_s: float) -> Choice:
    tree = Tree(path for _, path in c.growth[: c.n - 1])
    return Choice(tree, c.expected, c.seconds, c.rate, c.expected * plain_s / c.seconds)


def _checked(accuracies: npt.ArrayLike) -> FloatArray:
    try:
        table = np.asarray(accuracies, np.float64)
    except (ValueError, TypeError) as error:
        raise UsageError(f"accuracies: not a table of numbers ({error})") from None
    if table.ndim != 2:
        raise UsageError(f"accuracies of shape {table.shape}: a table of heads and ranks is needed")
    outside = table[~((table >= 0) & (table <= 1))]
    if outside.size:
        raise UsageError(f"accuracies: {outside[0]} is not a probability (0 … 1)")
    return table
