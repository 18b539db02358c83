"""Tree growth: the nodes that pay, best first, over all draft sources and sequences of a step.

A node's probability is the product of the acceptance rates of the guesses on its path. The tree
takes nodes in the order of their probability, up to where the step earns most tokens per second:

    (B + Σ p) / (t(B + n) + drafting)    B sequences, n nodes, t as measured

Knows no clock, no policy and no llama.cpp. It is called between two decodes, where all caches are
cold and every numpy call costs some 5 µs more than elsewhere: so there are none.
"""

from __future__ import annotations

import collections.abc as abc
from heapq import heappop, heappush
from typing import Any, NamedTuple

from model.decoding.draft import ROOT_ONLY, Draft
from model.decoding.drafters.drafter import HEADS, ContinuationDrafter, Guesses
from model.planning.acceptance_rate import (
    AGREEING,
    ALONE,
    DISAGREEING,
    SequenceCalibration,
)
from model.trees.tree import Tree

UNKNOWN = -1  # token of a guess that is hoped for
# What drafting must promise, in multiples of what there is without: nodes that pay just so are as
# often a loss, as rates and seconds are estimates (BF16 at temperature 0.8: 0.30 accepted of nodes
# that break even at 0.45).
MIN_SPEEDUP = 1.04
LEAST = 0.01  # nodes less likely are left out: they pay on no machine


class Node:
    """A guess in a tree that grows.

    share: probability that it follows its parent; p: that of its path. source: who guessed it.
    judged: guesses of what follows it: calibration, kind and token, to be learnt from. n_chosen:
    of its children. looked: the heads were asked what follows it.
    """

    __slots__ = (
        "children",
        "cursors",
        "depth",
        "expanded",
        "index",
        "judged",
        "looked",
        "n_chosen",
        "p",
        "parent",
        "share",
        "source",
        "token",
    )

    def __init__(self, token: int, parent: Node | None, share: float, source: str) -> None:
        self.token = token
        self.parent = parent
        self.share = share
        self.source = source
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.p = 1.0
        self.index = 0
        self.n_chosen = 0
        self.expanded = False
        self.looked = False
        self.cursors: list[Any] = []
        self.children: dict[int, Node] = {}
        self.judged: list[tuple[SequenceCalibration, int, int]] = []


class Source(NamedTuple):
    """A continuation drafter of one sequence, and how often its guesses were right there."""

    drafter: ContinuationDrafter
    calibration: SequenceCalibration


class Growth:
    """The tree of one sequence in one step.

    root: its last token. sources: its continuation drafters. heads: how good the heads' guesses
    are. room: depth that is of use, as the sequence ends there. hope: by depth, how likely a guess
    of the heads would be right that they were not asked for; 0: none is hoped for.
    """

    def __init__(
        self,
        root: int,
        sources: abc.Sequence[Source],
        heads: SequenceCalibration,
        room: int,
    ) -> None:
        self.root = Node(root, None, 1.0, "")
        self.nodes: list[Node] = []  # chosen, in the order of the draft
        self.n_leaves = 1
        self.looked_depth = 0
        self.hope: abc.Sequence[float] = ()
        self._sources = sources
        self._heads = heads
        self.room = room
        self.root.cursors = [source.drafter.start() for source in sources]

    def children(self, node: Node) -> abc.Iterable[Node]:
        """Return the guesses of what follows a node, those that are hoped for included."""
        self.expand(node)
        found = node.children.values()
        if node.depth < len(self.hope) and not node.looked and node.depth < self.room:
            share = self.hope[node.depth]
            if share and (node.depth == self.looked_depth or node.token == UNKNOWN):
                hoped = Node(UNKNOWN, node, share, HEADS)
                hoped.expanded = True
                return [*found, hoped]
        return found

    def expand(self, node: Node) -> None:
        """Ask the continuation drafters what follows a node; once."""
        if node.expanded:
            return
        node.expanded = True
        if node.depth >= self.room:
            return
        parent = node.parent
        if parent is not None:
            for source, cursor in zip(self._sources, parent.cursors, strict=True):
                further = None
                if cursor is not None:
                    further = source.drafter.advance(cursor, node.token)
                node.cursors.append(further)
        found = list[tuple[Source, Guesses]]()
        for source, cursor in zip(self._sources, node.cursors, strict=True):
            if cursor is not None:
                guesses = source.drafter.guesses(cursor)
                if guesses:
                    found.append((source, guesses))
        for source, guesses in found:
            others = {
                token for other, theirs in found if other is not source for token, _ in theirs
            }
            self._add(node, guesses, others, source.calibration, source.drafter.name)

    def add_look(self, node: Node, guesses: Guesses) -> None:
        """Take what the heads guess behind a node."""
        node.looked = True
        if node.depth < self.room:
            self.expand(node)
            self._add(node, guesses, set(node.children), self._heads, HEADS)
        self.looked_depth = max(self.looked_depth, node.depth + 1)

    def _add(
        self,
        node: Node,
        guesses: Guesses,
        others: abc.Collection[int],
        calibration: SequenceCalibration,
        source: str,
    ) -> None:
        """Hang guesses under a node; of two for one token the surer one counts.

        others: what other sources have guessed there.
        """
        children = node.children
        apart = DISAGREEING if others else ALONE
        for token, kind in guesses:
            kind = 3 * kind + (AGREEING if token in others else apart)
            node.judged.append((calibration, kind, token))
            share = calibration.probability(kind)
            known = children.get(token)
            if known is None:
                children[token] = Node(token, node, share, source)
            elif share > known.share:
                known.share = share
                known.source = source

    def draft(self) -> Draft:
        """Return the chosen nodes as a draft tree."""
        if not self.nodes:
            return Draft(ROOT_ONLY, [self.root.token], (), self.looked_depth)
        tokens = [self.root.token]
        parents = list[int]()
        sources = list[str]()
        shares = list[float]()
        for i, node in enumerate(self.nodes, 1):
            assert node.parent is not None
            node.index = i
            tokens.append(node.token)
            parents.append(node.parent.index)
            sources.append(node.source)
            shares.append(node.share)
        tree = Tree.from_parents(tuple(parents))
        return Draft(tree, tokens, sources, self.looked_depth, shares)

    def learn(self, node: int, emitted: abc.Sequence[int]) -> None:
        """Hold all guesses behind the accepted nodes against what came.

        node: the last accepted one of the draft. Guesses that were not drafted count as well.
        """
        path = list[Node]()
        at = self.nodes[node - 1] if node else self.root
        while at.parent is not None:
            path.append(at)
            at = at.parent
        path.append(self.root)
        for each, token in zip(reversed(path), emitted, strict=False):
            for calibration, kind, guess in each.judged:
                calibration.record(kind, guess == token)


class Limits(NamedTuple):
    """Of the draft tree of each sequence: nodes, the root left out, and leaves."""

    nodes: int
    leaves: int


def grow(
    growths: abc.Sequence[Growth],
    offers: abc.Sequence[tuple[int, float]],
    plain_rate: float,
    limits: Limits,
    draft_seconds: float = 0.0,
) -> float:
    """Choose the nodes of each growth that earn most; return the tokens per second.

    offers: rows of a step, all roots included, and its seconds, ascending. plain_rate: tokens per
    second without any draft, which is what there is where no draft earns more.
    draft_seconds: of drafting, spent already: with them even a step without nodes earns less.
    """
    n = len(growths)
    rows = n
    expected = float(n)
    without = plain_rate
    if draft_seconds:
        without = n / (n / plain_rate + draft_seconds)
    best_rate = MIN_SPEEDUP * without
    best = 0
    chosen = list[tuple[Growth, Node]]()
    heap = list[tuple[float, int, Growth, Node]]()
    pushed = 0
    for growth in growths:
        growth.n_leaves = 1
        growth.root.n_chosen = 0
        for child in growth.children(growth.root):
            pushed += 1
            child.p = child.share
            heappush(heap, (-child.p, pushed, growth, child))

    n_chosen = dict.fromkeys(growths, 0)
    next_offer = 0
    while heap:
        # Could any number of nodes as likely as the best one that is left still earn more?
        p = -heap[0][0]
        while next_offer < len(offers) and offers[next_offer][0] <= rows:
            next_offer += 1
        if p < LEAST or not _may_earn(
            offers[next_offer:], rows, expected, p, best_rate, draft_seconds
        ):
            break

        # Take it, where it has a place.
        _, _, growth, node = heappop(heap)
        parent = node.parent
        assert parent is not None
        if n_chosen[growth] == limits.nodes:
            continue
        if parent.n_chosen:
            if growth.n_leaves == limits.leaves:
                continue
            growth.n_leaves += 1
        parent.n_chosen += 1
        node.n_chosen = 0
        n_chosen[growth] += 1
        chosen.append((growth, node))
        rows += 1
        expected += p
        if next_offer < len(offers) and offers[next_offer][0] == rows:
            rate = expected / (offers[next_offer][1] + draft_seconds)
            if rate > best_rate:
                best_rate = rate
                best = len(chosen)
        for child in growth.children(node):
            pushed += 1
            child.p = p * child.share
            heappush(heap, (-child.p, pushed, growth, child))

    for growth in growths:
        growth.nodes = []
    for growth, node in chosen[:best]:
        growth.nodes.append(node)
    return best_rate if best else without


def _may_earn(
    offers: abc.Sequence[tuple[int, float]],
    rows: int,
    expected: float,
    p: float,
    best_rate: float,
    draft_seconds: float,
) -> bool:
    """Say whether more nodes of probability p each could beat the best rate so far."""
    for size, seconds in offers:
        if expected + (size - rows) * p > best_rate * (seconds + draft_seconds):
            return True
    return False
