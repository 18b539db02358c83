"""How many nodes each slot gets now. Knows trees and slots, neither logits nor the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.trees.tree import Tree

if TYPE_CHECKING:
    from model.decoding.step import Slot

ROOT_ONLY = Tree([])


class FixedPlan:
    """The same tree for every slot in every step: repeatable runs."""

    def __init__(self, tree: Tree = ROOT_ONLY) -> None:
        self.tree = tree

    def tree_for(self, slot: Slot) -> Tree:
        """Return the tree of a slot's next step: the root alone while there is no state to draft from."""
        return ROOT_ONLY if slot.hidden is None or slot.drafter is None else self.tree
