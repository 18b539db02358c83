"""What a plan is: it says what each slot drafts now. Knows trees and slots, neither logits nor the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from model.decoding.slot import Slot
from model.trees.tree import Tree

ROOT_ONLY = Tree([])
Draft = Literal["auto", "medusa", "ngram", "both", "none"]  # who drafts: whoever is there, heads, the text so far …


class Proposal(NamedTuple):
    """What to draft for one slot: the heads' tree, and a branch of up to so many tokens of those that may follow."""

    tree: Tree
    following: list[int]
    branch: int


class Plan(Protocol):
    """Decides what is drafted. lanes, max_nodes: the most leaves and nodes (with the root) that a slot may get."""

    lanes: int
    max_nodes: int

    def wants_state(self, slot: Slot) -> bool:
        """Say whether the slot's next step but one will draft with heads, which read this step's state."""
        ...

    def propose(self, slot: Slot) -> Proposal:
        """Return what to draft for a slot's next step, were it alone."""
        ...

    def propose_all(self, slots: Sequence[Slot]) -> list[Proposal]:
        """Return what to draft for slots that share the next pass."""
        ...

    def learn(self, slot: Slot, proposal: Proposal, tokens: list[int], won: list[int], rows: int, took: float) -> None:
        """Take note of a step: the tree's tokens, those won, the rows of the whole pass and its seconds undrafted."""
        ...


class FixedPlan:
    """The same tree for every slot in every step, and a branch wherever the text so far has one: repeatable runs."""

    def __init__(self, tree: Tree = ROOT_ONLY, branch: int = 0) -> None:
        self.tree, self.branch = tree, branch
        self.lanes, self.max_nodes = len(tree.leaves) + (branch > 0 and len(tree) > 1), len(tree) + branch

    def wants_state(self, slot: Slot) -> bool:
        """See Plan."""
        return slot.drafter is not None and len(self.tree) > 1

    def propose(self, slot: Slot) -> Proposal:
        """Return the tree, or the root alone while there is no state to draft from."""
        following = slot.ngrams.propose(self.tree.max_depth + self.branch)[0] if self.branch and slot.ngrams else []
        return Proposal(ROOT_ONLY if slot.hidden is None or slot.drafter is None else self.tree, following, self.branch)

    def propose_all(self, slots: Sequence[Slot]) -> list[Proposal]:
        """See Plan."""
        return [self.propose(slot) for slot in slots]

    def learn(self, slot: Slot, proposal: Proposal, tokens: list[int], won: list[int], rows: int, took: float) -> None:
        """Learn nothing."""
