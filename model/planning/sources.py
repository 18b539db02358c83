"""Draft sources as the policy knows them: what each may draft, what that takes, how good it is.

Knows the names of drafters and the shapes of their drafts; neither how they guess nor the cache. A
source model holds for all sequences, a source history for one. There are two kinds, as there are
two kinds of drafters: tree sources (draft heads) and continuation sources (n-grams); the policy
takes any number of each.
"""

from __future__ import annotations

import collections.abc as abc
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt

from model.decoding.draft import Continuation, TreeDraft
from model.decoding.sequence import Sequence
from model.planning.acceptance_rate import AcceptanceRate
from model.planning.node_budget import Expectation
from model.trees.tree import RankPath, Tree

Float64Array = npt.NDArray[np.float64]

# How often the first token of a continuation is accepted, by its strength: the bits of the number
# of tokens that agree before it (0: none, 2: two or three, … 6: 32). And each token behind it. Only
# priors, corrected within a few steps.
FIRST_ACCEPTANCE = (0.0, 0.0, 0.4, 0.55, 0.7, 0.85, 0.95)
LATER_ACCEPTANCE = 0.85


class SourceHistory(Protocol):
    """What one source has shown for one sequence."""

    def available(self, sequence: Sequence) -> bool:
        """Say whether the sequence has the source at all."""
        ...

    def look(self, sequence: Sequence, n_tokens: int) -> int:
        """Return how much speaks for a draft in this step: 1 … `strengths`, or 0 for none.

        n_tokens: how far to look ahead.
        """
        ...

    def expect(self, strength: int, *, untried: bool) -> Expectation:
        """Return what is expected of a draft of this strength.

        untried: as if nothing had been seen yet, after a pause; continuations never pause.
        """
        ...

    def draft(self, n_nodes: int) -> TreeDraft | Continuation:
        """Return the draft of so many nodes that the last look has found."""
        ...

    def learn(self, guesses: list[int] | None, emitted: list[int]) -> None:
        """Compare with what the step emitted.

        guesses: a tree's tokens; None where no tree was drafted.
        """
        ...

    def decay(self, factor: float) -> None:
        """Let what was seen count for less."""
        ...

    def forget(self, factor: float) -> None:
        """Let what was seen of all sequences count for less."""
        ...


class SourceModel(Protocol):
    """A draft source.

    name: the drafter's. strengths: how many kinds of evidence for a draft it tells apart.
    max_nodes: without the root. max_leaves: that it can add to a draft tree. max_depth: of its
    trees; 0 for a continuation, which is a chain behind the root or behind another source's nodes.
    needs_hidden: it drafts from the final hidden state of the step before. draft_seconds:
    (max_nodes + 1,) by the nodes drafted; None: it takes none.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def strengths(self) -> int: ...  # noqa: D102
    @property
    def max_nodes(self) -> int: ...  # noqa: D102
    @property
    def max_leaves(self) -> int: ...  # noqa: D102
    @property
    def max_depth(self) -> int: ...  # noqa: D102
    @property
    def needs_hidden(self) -> bool: ...  # noqa: D102
    @property
    def draft_seconds(self) -> Float64Array | None: ...  # noqa: D102

    def history(self) -> SourceHistory:
        """Return an empty history, for a new sequence."""
        ...


class TreeSource:
    """A tree drafter, whose trees grow node by node in the order of `paths` that a search found.

    accuracies: (K, R), probability of each guess where its parent was accepted, as measured
    beforehand. draft_seconds: (D,) of drafting for one sequence, by the depth of the tree, from 1
    on.
    """

    strengths = 1
    needs_hidden = True

    def __init__(
        self,
        name: str,
        paths: abc.Sequence[RankPath],
        accuracies: npt.NDArray[np.float64],
        draft_seconds: abc.Sequence[float],
    ) -> None:
        self.name = name
        self.trees = [Tree(paths[:n]) for n in range(len(paths) + 1)]
        self.drafts = [TreeDraft(name, tree) for tree in self.trees]
        self.max_nodes = len(paths)
        self.max_leaves = max((len(tree.leaves) for tree in self.trees[1:]), default=0)
        self.max_depth = self.trees[-1].max_depth
        by_depth = [0.0, *draft_seconds]
        self.draft_seconds = np.array([by_depth[tree.max_depth] for tree in self.trees])
        # (T, D): probability that a tree of so many nodes has the right token at each depth, given
        # it had it above.
        self.rates = np.zeros((len(self.trees), self.max_depth))
        for n, tree in enumerate(self.trees):
            self.rates[n] = _rates_by_depth(tree, accuracies, self.max_depth)
        self.promised: list[list[float]] = self.rates.tolist()
        self.by_depth = [AcceptanceRate(1.0) for _ in range(self.max_depth)]  # of all sequences

    def history(self) -> TreeHistory:
        """See SourceModel."""
        return TreeHistory(self)


def _rates_by_depth(
    tree: Tree, accuracies: npt.NDArray[np.float64], max_depth: int
) -> Float64Array:
    """Return (D,) the probability that an accepted path goes on to a depth; 0 beyond the tree."""
    accepted = np.ones(len(tree))
    for node in range(1, len(tree)):
        rate = accuracies[tree.depths[node] - 1, tree.ranks[node]]
        accepted[node] = accepted[tree.parents[node]] * rate
    reached = np.bincount(tree.depths, accepted, minlength=max_depth + 1)
    rates = np.zeros(max_depth)
    np.divide(reached[1:], reached[:-1], out=rates, where=reached[:-1] > 0)
    return rates


class TreeHistory:
    """How often a tree source was right for one sequence, by depth.

    The rates are ratios to what the accuracies of the source promise.
    """

    def __init__(self, source: TreeSource) -> None:
        self._source = source
        self.by_depth = [AcceptanceRate(rate) for rate in source.by_depth]

    def available(self, sequence: Sequence) -> bool:
        """See SourceHistory."""
        return self._source.max_nodes > 0 and self._source.name in sequence.tree_drafters

    def look(self, sequence: Sequence, n_tokens: int) -> int:
        """See SourceHistory."""
        if sequence.hidden is not None and self.available(sequence):
            return 1
        return 0

    def expect(self, strength: int, *, untried: bool) -> Expectation:
        """See SourceHistory."""
        rates = self._source.rates
        if not untried:
            rates = np.minimum(1.0, rates * np.array([rate.mean for rate in self.by_depth]))
        return Expectation(rates.cumprod(1).sum(1), 1.0 - rates[:, 0])

    def draft(self, n_nodes: int) -> TreeDraft:
        """See SourceHistory."""
        return self._source.drafts[n_nodes]

    def learn(self, guesses: list[int] | None, emitted: list[int]) -> None:
        """See SourceHistory."""
        if guesses is None:
            return
        tree = self._source.trees[len(guesses)]
        promised = self._source.promised[len(guesses)]
        tokens = [-1, *guesses]
        node = 0
        for depth, token in enumerate(emitted[: tree.max_depth]):
            node = tree.child_with(node, token, tokens)
            self.by_depth[depth].record(node > 0, promised[depth])
            if not node:
                break

    def decay(self, factor: float) -> None:
        """See SourceHistory."""
        for rate in self.by_depth:
            rate.decay(factor)

    def forget(self, factor: float) -> None:
        """See SourceHistory."""
        for rate in self.by_depth:
            rate.forget(factor)


class ContinuationSource:
    """A continuation drafter: a chain of up to max_tokens nodes, in no time to speak of.

    first_acceptance: prior for its first token, by strength; 0 where it is not to draft.
    later_acceptance: for others.
    """

    needs_hidden = False
    max_depth = 0
    draft_seconds = None

    def __init__(
        self,
        name: str,
        max_tokens: int,
        *,
        first_acceptance: abc.Sequence[float] = FIRST_ACCEPTANCE,
        later_acceptance: float = LATER_ACCEPTANCE,
    ) -> None:
        self.name = name
        self.max_nodes = max_tokens
        self.max_leaves = 1 if max_tokens else 0
        self.first_acceptance = tuple(first_acceptance)
        self.later_acceptance = later_acceptance
        self.strengths = len(self.first_acceptance) - 1
        # Of all sequences, by strength: of the first token; of others, by the bits of their depth:
        # what is right for eight tokens will be for more, while most that is right is short.
        depths = range(max(1, max_tokens).bit_length() + 1)
        self.first = [AcceptanceRate(prior) for prior in self.first_acceptance]
        self.later = [[AcceptanceRate(later_acceptance) for _ in depths] for _ in self.first]

    def history(self) -> ContinuationHistory:
        """See SourceModel."""
        return ContinuationHistory(self)


class ContinuationHistory:
    """How often a continuation source was right for one sequence, by strength and depth."""

    def __init__(self, source: ContinuationSource) -> None:
        self._source = source
        self.first = [AcceptanceRate(rate) for rate in source.first]
        self.later = [[AcceptanceRate(rate) for rate in depths] for depths in source.later]
        self._strength = 0  # of the last look
        self._tokens: list[int] = []

    def available(self, sequence: Sequence) -> bool:
        """See SourceHistory."""
        return self._source.max_nodes > 0 and self._source.name in sequence.continuation_drafters

    def look(self, sequence: Sequence, n_tokens: int) -> int:
        """See SourceHistory."""
        self._strength = 0
        drafter = sequence.continuation_drafters.get(self._source.name)
        if drafter is not None and self._source.max_nodes:
            self._tokens, agreeing = drafter.propose(n_tokens + self._source.max_nodes)
            strength = min(agreeing.bit_length(), self._source.strengths)
            if self._source.first_acceptance[strength]:
                self._strength = strength
        return self._strength

    def expect(self, strength: int, *, untried: bool) -> Expectation:
        """See SourceHistory."""
        first = self.first[strength].mean
        later = [rate.mean for rate in self.later[strength]]
        tokens = [0.0]
        accepted = first
        for depth in range(1, self._source.max_nodes + 1):
            tokens.append(tokens[-1] + accepted)
            accepted *= later[depth.bit_length()]
        missed = [1.0] + [1.0 - first] * self._source.max_nodes
        return Expectation(np.array(tokens), np.array(missed))

    def draft(self, n_nodes: int) -> Continuation:
        """See SourceHistory."""
        return Continuation(self._source.name, self._tokens, n_nodes)

    def learn(self, guesses: list[int] | None, emitted: list[int]) -> None:
        """See SourceHistory.

        Tokens that were not drafted show as well whether they would have been right.
        """
        rate = self.first[self._strength]
        later = self.later[self._strength]
        for depth, (guess, token) in enumerate(zip(self._tokens, emitted, strict=False), 1):
            rate.record(guess == token)
            if guess != token:
                break
            rate = later[min(depth.bit_length(), len(later) - 1)]

    def decay(self, factor: float) -> None:
        """See SourceHistory."""
        for rate in chain(self.first, *self.later):
            rate.decay(factor)

    def forget(self, factor: float) -> None:
        """See SourceHistory."""
        for rate in chain(self.first, *self.later):
            rate.forget(factor)
