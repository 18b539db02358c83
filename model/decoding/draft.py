"""The draft of one step: a tree with its tokens, and which source guessed each of them.

Knows no cache and no drafter. A node that two sources guess is there once, and counts for the one
that came first.
"""

from __future__ import annotations

import collections.abc as abc
from typing import NamedTuple

from model.trees.tree import Tree

ROOT_ONLY = Tree([])


class Draft(NamedTuple):
    """A draft tree with its tokens.

    tokens: (N,), the root's first. sources: (N - 1,) the names of the draft sources of the nodes
    1 … N-1. filled_depth: how deep the heads were asked, whatever became of it; 0: not at all.
    shares: (N - 1,) how likely each node was to follow its parent, where the policy knows that.
    """

    tree: Tree
    tokens: list[int]
    sources: abc.Sequence[str] = ()
    filled_depth: int = 0
    shares: abc.Sequence[float] = ()

    def with_chain(self, tokens: abc.Sequence[int], most: int, source: str) -> Draft:
        """Return the draft with a chain behind the root, of which at most `most` nodes are new.

        It is hung in where it parts from what is there.
        """
        node = 0
        at = 0
        while at < len(tokens):
            child = self.tree.child_with(node, tokens[at], self.tokens)
            if not child:
                break
            node = child
            at += 1
        new = list(tokens[at : at + most])
        if not new:
            return self
        return Draft(
            self.tree.with_chain(node, len(new)),
            self.tokens + new,
            [*self.sources, *[source] * len(new)],
            self.filled_depth,
        )


def no_draft(root: int) -> Draft:
    """Return the draft of a plain step. root: the last decided token."""
    return Draft(ROOT_ONLY, [root])
