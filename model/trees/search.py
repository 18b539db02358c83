"""The search for the tree that earns most tokens per second. Knows no model and no clock.

It takes rank accuracies and measured times. Accuracies: (K, R); [k, r] is the probability that
guess r of head k + 1 is right, given that its parent was accepted. It depends on depth and rank
only (Sequoia's positional acceptance, arXiv 2402.12374), so a node's probability is the product
along its path, and the expected tokens of a step are 1 + the sum over all nodes.

A child is never likelier than its parent. So the m likeliest nodes always form a tree, and no tree
of m nodes has a greater sum: growing by the likeliest node (Medusa, arXiv 2401.10774, "optimized
tree construction") is exact here, and Sequoia's dynamic programme, which
tests/unit/test_search.py holds against it, finds nothing better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.errors import UsageError
from model.trees.tree import MAX_LEAVES, RankPath, Tree

FloatArray = npt.NDArray[np.float64]
Ranked = list[list[tuple[float, int]]]  # per head: (accuracy, rank), likeliest first
Growth = list[tuple[float, RankPath]]  # (probability, node), in the order in which nodes join


@dataclass(frozen=True, kw_only=True)
class TreeChoice:
    """A tree and what it is expected to earn.

    expected_length: tokens per step. seconds: per step, drafting included. speedup: against plain
    decoding, which takes the time of one token and drafts nothing.
    """

    tree: Tree
    expected_length: float
    seconds: float
    tokens_per_s: float
    speedup: float


def grow(accuracies: npt.ArrayLike, n_max: int, *, max_leaves: int = MAX_LEAVES) -> list[RankPath]:
    """Return up to n_max rank paths of which the first m are the best tree of m drafted nodes.

    accuracies: (K, R). Parents come before their children. Equally likely nodes: the shallower
    first, then the lower ranks. A rank that is likelier than the ones before it comes without them.
    Nodes of probability 0 are left out, and so is what would make more than max_leaves leaves
    (there the growth is greedy, no longer the optimum).
    Raises UsageError for accuracies that are not (K, R) or not within 0 … 1.
    """
    growth = _grow(_ranked(_checked(accuracies)), n_max, max_leaves)
    return [path for _, path in growth]


def expected_lengths(accuracies: npt.ArrayLike, paths: Sequence[RankPath]) -> FloatArray:
    """Return (len(paths) + 1,) tokens per step with the first m = 0, 1, … nodes.

    That is 1 + the sum of their probabilities. accuracies: (K, R). paths: drafted nodes, parents
    before their children, without the root.
    Raises UsageError for accuracies as `grow` does, and for a path outside of them.
    """
    table = _checked(accuracies)
    n_heads, n_ranks = table.shape
    for path in paths:
        inside = all(0 <= rank < n_ranks for rank in path)
        if not inside or not 0 < len(path) <= n_heads:
            raise UsageError(
                f"tree: the path {list(path)} is outside of accuracies of shape {table.shape}"
            )
    rows = table.tolist()
    return _lengths([prod(rows[d][rank] for d, rank in enumerate(path)) for path in paths])


def best_tree(
    accuracies: npt.ArrayLike,
    step_seconds: npt.ArrayLike,
    *,
    draft_seconds: npt.ArrayLike,
    max_nodes: int,
    max_leaves: int = MAX_LEAVES,
) -> TreeChoice:
    """Return the tree with the most expected tokens per second; the root alone if nothing pays.

    accuracies: (K, R). step_seconds: (max_nodes,) or more, the time to verify n = 1, 2, … nodes,
    the root included; infinity keeps a size from being chosen. draft_seconds: a number or (K,),
    what a step pays for drafting when its tree is 1 … K deep, not falling; a step without drafts
    pays nothing. max_nodes: with the root.

    Every size is tried, with every depth and as a chain. Of equals the smaller tree is taken, then
    the chain, then the shallower. Unless max_leaves binds, no tree at all earns more.
    Raises UsageError as `grow` does.
    """
    plain_s, best = _sweep(accuracies, step_seconds, draft_seconds, max_nodes, max_leaves)
    return _choice(max(best, key=lambda candidate: candidate.rate), plain_s)


def all_choices(
    accuracies: npt.ArrayLike,
    step_seconds: npt.ArrayLike,
    *,
    draft_seconds: npt.ArrayLike,
    max_nodes: int,
    max_leaves: int = MAX_LEAVES,
) -> list[TreeChoice]:
    """Return the best tree of each size from 1 (the root alone) on, for tables and pictures.

    Takes and raises what `best_tree` does. Sizes are left out where the likely nodes run out, or
    the time is infinite.
    """
    plain_s, best = _sweep(accuracies, step_seconds, draft_seconds, max_nodes, max_leaves)
    return [_choice(candidate, plain_s) for candidate in best]


@dataclass(frozen=True)
class _Candidate:
    """The first n - 1 nodes of a growth.

    There is no Tree yet, as building one takes longer than judging it.
    """

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
    """Return plain decoding's seconds per token, and each size's best candidate, smallest first."""
    table = _checked(accuracies)
    steps = np.asarray(step_seconds, np.float64)
    draft = np.asarray(draft_seconds, np.float64)
    assert 0 < max_nodes <= len(steps) and max_leaves > 0, f"{max_nodes} nodes, {len(steps)} times"
    assert bool((steps > 0).all()) and steps[0] < np.inf, "verify times are above 0"
    assert draft.shape in ((), (len(table),)), "one drafting time, or one per depth"
    assert bool((draft >= 0).all()), "drafting times are not below 0"
    draft = np.broadcast_to(draft, len(table))

    plain_s = float(steps[0])
    best = {1: _Candidate(1, [], 1.0, plain_s)}
    for growth in _growths(table, max_nodes - 1, max_leaves):
        depths = np.maximum.accumulate([len(path) for _, path in growth])
        seconds = (steps[1 : len(growth) + 1] + draft[depths - 1]).tolist()
        expected = _lengths([probability for probability, _ in growth])[1:].tolist()
        for n, (tokens, each_s) in enumerate(zip(expected, seconds, strict=True), 2):
            if each_s == np.inf:
                continue
            if n not in best or tokens / each_s > best[n].rate:
                best[n] = _Candidate(n, growth, tokens, each_s)
    return plain_s, [best[n] for n in sorted(best)]


def _growths(table: FloatArray, n_max: int, max_leaves: int) -> list[Growth]:
    """Return the chain of first guesses and a greedy growth for each depth; none is empty.

    Each depth has its own, as drafting costs by depth.
    """
    chain = Growth()
    probability = 1.0
    for depth, accuracy in enumerate(table[:n_max, :1].ravel().tolist(), 1):
        probability *= accuracy
        if probability == 0:
            break
        chain.append((probability, (0,) * depth))
    ranked = _ranked(table)
    grown = [_grow(ranked[:depth], n_max, max_leaves) for depth in range(1, len(ranked) + 1)]
    return [growth for growth in (chain, *grown) if growth]


class _Offer(NamedTuple):
    """A node that may join the tree; the heap's order, the likeliest first.

    guess_index: of its guess among the guesses of its depth, the likeliest first.
    """

    minus_probability: float
    depth: int
    path: RankPath
    guess_index: int
    parent_probability: float


def _grow(ranked: Ranked, n_max: int, max_leaves: int) -> Growth:
    """Take the likeliest node that may hang under the tree, n_max times.

    Whenever a node joins, its first child and its next sibling are on offer; no others need be, as
    they are not likelier.
    """
    grown = Growth()
    leaves = 1
    heap: list[_Offer] = []

    def offer(parent: RankPath, parent_probability: float, index: int) -> None:
        depth = len(parent)
        if depth >= len(ranked) or index >= len(ranked[depth]):
            return
        accuracy, rank = ranked[depth][index]
        probability = accuracy * parent_probability
        if probability > 0:
            path = (*parent, rank)
            heappush(heap, _Offer(-probability, depth + 1, path, index, parent_probability))

    offer((), 1.0, 0)
    while heap and len(grown) < n_max:
        node = heappop(heap)
        if node.guess_index > 0:  # a first child continues its parent's leaf, a sibling is one more
            if leaves == max_leaves:
                continue
            leaves += 1
        probability = -node.minus_probability
        grown.append((probability, node.path))
        offer(node.path, probability, 0)
        offer(node.path[:-1], node.parent_probability, node.guess_index + 1)
    return grown


def _ranked(table: FloatArray) -> Ranked:
    rows = table.tolist()
    return [
        sorted(((accuracy, rank) for rank, accuracy in enumerate(row)), key=lambda pair: -pair[0])
        for row in rows
    ]


def _lengths(probabilities: list[float]) -> FloatArray:
    """(M + 1,): 1 + the sum of the first m probabilities."""
    return np.cumsum([1.0, *probabilities])


def _choice(candidate: _Candidate, plain_s: float) -> TreeChoice:
    rate = candidate.rate
    return TreeChoice(
        tree=Tree(path for _, path in candidate.growth[: candidate.n - 1]),
        expected_length=candidate.expected,
        seconds=candidate.seconds,
        tokens_per_s=rate,
        speedup=candidate.expected * plain_s / candidate.seconds,
    )


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
