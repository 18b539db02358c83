"""The draft of one step: what a policy proposes, and the tree that the drafters' guesses make.

Knows no cache. Several sources share one tree. A node that two of them guess is there once, and
counts for the source that came first.
"""

from __future__ import annotations

import collections.abc as abc
from typing import NamedTuple

from model.trees.tree import Tree

ROOT_ONLY = Tree([])


class TreeDraft(NamedTuple):
    """A tree that a tree drafter fills. source: the drafter's name."""

    source: str
    tree: Tree


class Continuation(NamedTuple):
    """Tokens that a continuation drafter expects behind the root.

    Those that no other source has drafted become nodes of their own, n_nodes at the most.
    """

    source: str
    tokens: list[int]
    n_nodes: int


class Proposal(NamedTuple):
    """What one sequence drafts in one step; nothing where both are empty."""

    trees: tuple[TreeDraft, ...] = ()
    continuations: tuple[Continuation, ...] = ()


NO_DRAFT = Proposal()


class Draft(NamedTuple):
    """A draft tree with its tokens.

    tokens: (N,), the root's first. spans: (source, node behind its last one), in the order of the
    nodes. filled_depth: the depth of the deepest tree that a tree drafter filled.
    """

    tree: Tree
    tokens: list[int]
    spans: tuple[tuple[str, int], ...] = ()
    filled_depth: int = 0

    def source_of(self, node: int) -> str:
        """Return the name of the source that guessed a node other than the root."""
        for source, end in self.spans:
            if node < end:
                return source
        raise AssertionError(f"node {node} is not in the tree")


def assemble(root: int, proposal: Proposal, filled: abc.Sequence[list[int]]) -> Draft:
    """Join the guesses of all sources into one draft tree.

    root: the last decided token. filled: for each tree of the proposal the tokens of its nodes 1 …
    N-1.
    """
    if not proposal.continuations:
        if not proposal.trees:
            return Draft(ROOT_ONLY, [root])
        if len(proposal.trees) == 1:
            [(source, tree)] = proposal.trees
            return Draft(tree, [root, *filled[0]], ((source, len(tree)),), tree.max_depth)
    tree = ROOT_ONLY
    tokens = [root]
    spans = list[tuple[str, int]]()
    depth = 0
    for part, guesses in zip(proposal.trees, filled, strict=True):
        depth = max(depth, part.tree.max_depth)
        if len(tree) == 1:
            tree = part.tree
            tokens += guesses
        else:  # a further tree joins path by path
            known = [root, *guesses]
            for leaf in part.tree.leaves.tolist():
                path = [known[node] for node in part.tree.path_to(leaf)[1:]]
                tree, tokens = _graft(tree, tokens, path, len(path))
        spans.append((part.source, len(tree)))
    for continuation in proposal.continuations:
        tree, tokens = _graft(tree, tokens, continuation.tokens, continuation.n_nodes)
        spans.append((continuation.source, len(tree)))
    return Draft(tree, tokens, tuple(spans), depth)


def _graft(tree: Tree, tokens: list[int], path: list[int], most: int) -> tuple[Tree, list[int]]:
    """Return the tree with a chain hung in where it parts from what is there, and all tokens."""
    node = 0
    at = 0
    while at < len(path):
        child = tree.child_with(node, path[at], tokens)
        if not child:
            break
        node = child
        at += 1
    new = path[at : at + most]
    if not new:
        return tree, tokens
    return tree.with_chain(node, len(new)), tokens + new
