"""Draft trees from several sources.

A node that two guess is there once, and every node knows who guessed it.
"""

from __future__ import annotations

from model.decoding.draft import Draft, no_draft
from model.decoding.draft_policy import FixedPolicy
from model.trees.tree import Tree

TREE = Tree([(0,), (1,), (0, 0)])
FILLED = [5, 6, 7]  # the root's children 5 and 6; 7 under 5
HEADS = ["heads"] * 3


def joined(tokens: list[int], n_nodes: int) -> tuple[list[int], list[int], list[str]]:
    draft = Draft(TREE, [9, *FILLED], HEADS, 2).with_chain(tokens, n_nodes, "ngram")
    assert len(draft.tree.leaves) <= FixedPolicy(TREE, n_nodes).max_leaves
    assert draft.filled_depth == 2
    return draft.tokens, draft.tree.parents.tolist(), list(draft.sources)


def test_nothing_drafted_is_the_root_alone() -> None:
    draft = no_draft(9)
    assert draft.tokens == [9] and len(draft.tree) == 1 and len(draft.sources) == 0


def test_a_continuation_leaves_the_tree_where_the_two_part() -> None:
    assert joined([5, 7, 1, 2, 3], 2) == (
        [9, 5, 6, 7, 1, 2],
        [-1, 0, 0, 1, 3, 4],
        [*HEADS, "ngram", "ngram"],
    )
    assert joined([6, 8], 2) == ([9, 5, 6, 7, 8], [-1, 0, 0, 1, 2], [*HEADS, "ngram"])
    assert joined([4, 4], 1) == ([9, 5, 6, 7, 4], [-1, 0, 0, 1, 0], [*HEADS, "ngram"])
    assert joined([5, 7], 4) == ([9, *FILLED], TREE.parents.tolist(), HEADS)


def test_chains_of_several_sources_share_the_tree() -> None:
    draft = Draft(TREE, [9, *FILLED], HEADS, 2)
    draft = draft.with_chain([5, 8], 2, "b").with_chain([6, 2, 3], 2, "c")
    draft = draft.with_chain([6, 2, 3, 4], 1, "d")
    #                     heads: 5 6 7 | b: 8 under 5 | c: 2, 3 under 6 | d: 4 behind them
    assert draft.tokens == [9, 5, 6, 7, 8, 2, 3, 4]
    assert draft.tree.parents.tolist() == [-1, 0, 0, 1, 1, 2, 5, 6]
    assert draft.sources == [*HEADS, "b", "c", "c", "d"]


def test_trees_by_parents_are_kept_and_number_their_children() -> None:
    tree = Tree.from_parents((0, 0, 1, 1, 2))
    assert tree.paths == ((), (0,), (1,), (0, 0), (0, 1), (1, 0))
    assert tree.parents.tolist() == [-1, 0, 0, 1, 1, 2]
    assert Tree.from_parents((0, 0, 1, 1, 2)) is tree
    assert len(Tree.from_parents(())) == 1
