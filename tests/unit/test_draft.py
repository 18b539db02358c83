"""Draft trees from several sources.

A node that two guess is there once, and every node knows who guessed it.
"""

from __future__ import annotations

from model.decoding.draft import Continuation, Proposal, TreeDraft, assemble
from model.decoding.draft_policy import FixedPolicy
from model.trees.tree import Tree

TREE = Tree([(0,), (1,), (0, 0)])
FILLED = [5, 6, 7]  # the root's children 5 and 6; 7 under 5


def joined(
    tokens: list[int], n_nodes: int
) -> tuple[list[int], list[int], tuple[tuple[str, int], ...]]:
    proposal = Proposal((TreeDraft("heads", TREE),), (Continuation("ngram", tokens, n_nodes),))
    draft = assemble(9, proposal, [FILLED])
    assert len(draft.tree.leaves) <= FixedPolicy(TREE, n_nodes).max_leaves
    assert draft.filled_depth == 2
    return draft.tokens, draft.tree.parents.tolist(), draft.spans


def test_nothing_proposed_is_the_root_alone() -> None:
    draft = assemble(9, Proposal(), [])
    assert draft.tokens == [9] and len(draft.tree) == 1 and draft.spans == ()


def test_a_continuation_leaves_the_tree_where_the_two_part() -> None:
    assert joined([5, 7, 1, 2, 3], 2) == (
        [9, 5, 6, 7, 1, 2],
        [-1, 0, 0, 1, 3, 4],
        (("heads", 4), ("ngram", 6)),
    )
    assert joined([6, 8], 2) == ([9, 5, 6, 7, 8], [-1, 0, 0, 1, 2], (("heads", 4), ("ngram", 5)))
    assert joined([4, 4], 1) == ([9, 5, 6, 7, 4], [-1, 0, 0, 1, 0], (("heads", 4), ("ngram", 5)))
    assert joined([5, 7], 4) == ([9, *FILLED], TREE.parents.tolist(), (("heads", 4), ("ngram", 4)))


def test_sources_of_any_number_share_one_tree() -> None:
    second = Tree([(0,), (0, 0), (0, 1)])
    proposal = Proposal(
        (TreeDraft("a", TREE), TreeDraft("b", second)),
        (Continuation("c", [6, 2, 3], 2), Continuation("d", [6, 2, 3, 4], 1)),
    )
    filled = [list(FILLED), [5, 7, 8]]
    draft = assemble(9, proposal, filled)
    #                     a: 5  6  7 | b: 8 under 5 | c: 2, 3 under 6 | d: 4 behind them
    assert draft.tokens == [9, 5, 6, 7, 8, 2, 3, 4]
    assert draft.tree.parents.tolist() == [-1, 0, 0, 1, 1, 2, 5, 6]
    assert [draft.source_of(node) for node in range(1, 8)] == ["a", "a", "a", "b", "c", "c", "d"]
    assert draft.spans == (("a", 4), ("b", 5), ("c", 7), ("d", 8))
    assert filled == [FILLED, [5, 7, 8]], "the drafters' lists stay as they were"
