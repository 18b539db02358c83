"""The draft policy: says what each sequence drafts in the next step, and sees what came of it.

Knows trees and sequences, neither logits nor the cache. The policy that adapts lies in
`model/planning`.
"""

from __future__ import annotations

import collections.abc as abc
from typing import NamedTuple, Protocol

from model.decoding.draft import NO_DRAFT, ROOT_ONLY, Continuation, Proposal, TreeDraft
from model.decoding.drafters.drafter import HEADS, NGRAM
from model.decoding.sequence import Sequence
from model.trees.tree import Tree


class StepOutcome(NamedTuple):
    """What a step was for one of its sequences.

    proposal: what it drafted. filled: for each tree of the proposal the tokens of its nodes 1 …
    N-1. emitted: the tokens that the step gave the sequence. n_rows, seconds: of the whole step,
    drafting left out.
    """

    proposal: Proposal
    filled: abc.Sequence[list[int]]
    emitted: list[int]
    n_rows: int
    seconds: float


class DraftPolicy(Protocol):
    """Decides what is drafted.

    max_leaves, max_nodes: of a sequence's draft tree, the root included in the nodes.
    """

    max_leaves: int
    max_nodes: int

    def wants_hidden(self, sequence: Sequence) -> bool:
        """Say whether the next step but one will draft from the hidden state of the next one."""
        ...

    def propose(self, sequences: abc.Sequence[Sequence]) -> list[Proposal]:
        """Return what each of the sequences that share the next step drafts."""
        ...

    def record(self, sequence: Sequence, outcome: StepOutcome) -> None:
        """Take note of a sequence's part of a step."""
        ...


class FixedPolicy:
    """The same draft in every step, so that runs can be repeated to the bit.

    A tree, a continuation, or nothing. tree: filled by the heads. continuation: the most tokens
    that the n-gram drafter adds.
    """

    def __init__(self, tree: Tree = ROOT_ONLY, continuation: int = 0) -> None:
        self.tree = tree
        self.continuation = continuation
        self._tree_alone = NO_DRAFT
        if len(tree) > 1:
            self._tree_alone = Proposal((TreeDraft(HEADS, tree),))
        self.max_leaves = len(tree.leaves) + (1 if continuation and len(tree) > 1 else 0)
        self.max_nodes = len(tree) + continuation

    def wants_hidden(self, sequence: Sequence) -> bool:
        """See DraftPolicy."""
        return len(self.tree) > 1 and HEADS in sequence.tree_drafters

    def propose(self, sequences: abc.Sequence[Sequence]) -> list[Proposal]:
        """See DraftPolicy. Where there is no hidden state yet, the tree is left out."""
        return [self._propose(sequence) for sequence in sequences]

    def _propose(self, sequence: Sequence) -> Proposal:
        drafts_tree = sequence.hidden is not None and HEADS in sequence.tree_drafters
        proposal = self._tree_alone if drafts_tree else NO_DRAFT
        ngram = sequence.continuation_drafters.get(NGRAM)
        if not self.continuation or ngram is None:
            return proposal
        tokens, _ = ngram.propose(self.tree.max_depth + self.continuation)
        return Proposal(proposal.trees, (Continuation(NGRAM, tokens, self.continuation),))

    def record(self, sequence: Sequence, outcome: StepOutcome) -> None:
        """Learn nothing."""
