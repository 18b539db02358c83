"""The draft policy: says what each sequence drafts in the next step, and sees what came of it.

Knows trees and sequences, not the cache. The policy that adapts lies in `model/planning`.
"""

from __future__ import annotations

import collections.abc as abc
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from model.decoding.draft import ROOT_ONLY, Draft, no_draft
from model.decoding.drafters.drafter import HEADS, NGRAM, TreeDrafter, likeliest_chain
from model.decoding.sequence import Sequence
from model.trees.tree import Tree


class StepOutcome(NamedTuple):
    """What a step was for one of its sequences.

    draft: its draft tree. node: the last accepted one. emitted: the tokens that the step gave the
    sequence, which has them already. logits: (N, V) of the tree, a view that will change. n_rows,
    seconds: of the whole step, drafting left out.
    """

    draft: Draft
    node: int
    emitted: list[int]
    logits: npt.NDArray[np.float32]
    n_rows: int
    seconds: float


class DraftPolicy(Protocol):
    """Decides what is drafted.

    max_leaves, max_nodes: of a sequence's draft tree, the root included in the nodes.
    """

    max_leaves: int
    max_nodes: int

    def wants_hidden(self, sequence: Sequence) -> bool:
        """Say whether the next step but one may draft from the hidden state of the next one."""
        ...

    def draft(self, sequences: abc.Sequence[Sequence]) -> list[Draft]:
        """Return what each of the sequences that share the next step drafts."""
        ...

    def record(self, sequence: Sequence, outcome: StepOutcome) -> None:
        """Take note of a sequence's part of a step."""
        ...


class FixedPolicy:
    """The same draft in every step, so that runs can be repeated to the bit.

    A tree, a continuation, or nothing. tree: filled by the heads. continuation: the most tokens
    that `source`, a continuation drafter, adds.
    """

    def __init__(
        self, tree: Tree = ROOT_ONLY, continuation: int = 0, *, source: str = NGRAM
    ) -> None:
        self.tree = tree
        self.continuation = continuation
        self.source = source
        self.max_leaves = len(tree.leaves) + (1 if continuation and len(tree) > 1 else 0)
        self.max_nodes = len(tree) + continuation

    def wants_hidden(self, sequence: Sequence) -> bool:
        """See DraftPolicy."""
        return len(self.tree) > 1 and HEADS in sequence.tree_drafters

    def draft(self, sequences: abc.Sequence[Sequence]) -> list[Draft]:
        """See DraftPolicy.

        The tree is left out where there is no hidden state yet, or no room for it.
        """
        drafts = [no_draft(sequence.tokens[-1]) for sequence in sequences]
        if len(self.tree) > 1:
            self._fill(sequences, drafts)
        if not self.continuation:
            return drafts
        for i, sequence in enumerate(sequences):
            drafter = sequence.continuation_drafters.get(self.source)
            if drafter is not None:
                most = self.tree.max_depth + self.continuation
                chain = likeliest_chain(drafter, min(most, sequence.draft_room))
                drafts[i] = drafts[i].with_chain(chain, self.continuation, self.source)
        return drafts

    def _fill(self, sequences: abc.Sequence[Sequence], drafts: list[Draft]) -> None:
        """Have the tree drafted for all that can; sequences with the same drafter share a call."""
        calls: dict[TreeDrafter, list[int]] = {}
        for i, sequence in enumerate(sequences):
            if self.tree.max_depth > sequence.draft_room:
                continue
            if sequence.hidden is not None and HEADS in sequence.tree_drafters:
                calls.setdefault(sequence.tree_drafters[HEADS], []).append(i)
        for drafter, users in calls.items():
            states = [state for i in users if (state := sequences[i].hidden) is not None]
            hidden = states[0] if len(states) == 1 else np.concatenate(states)
            roots = [sequences[i].tokens[-1] for i in users]
            guesses = drafter.draft(hidden, roots, [self.tree] * len(users))
            sources = [HEADS] * (len(self.tree) - 1)
            for i, root, tokens in zip(users, roots, guesses, strict=True):
                drafts[i] = Draft(self.tree, [root, *tokens], sources, self.tree.max_depth)

    def record(self, sequence: Sequence, outcome: StepOutcome) -> None:
        """Learn nothing."""
