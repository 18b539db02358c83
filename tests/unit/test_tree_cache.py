"""A draft tree in the KV cache.

Who sees whom, and what roll-back leaves, against a brute-force account of cells.
"""

from __future__ import annotations

import numpy as np
import pytest
from fake_base import FakeBase

from model.decoding.tree_cache import roll_back, tree_rows
from model.trees.tree import Tree

# nodes: root, (0,), (1,), (0, 0), (0, 1), (0, 0, 0); leaves: (1,), (0, 1), (0, 0, 0)
TREE = Tree([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)])


def ids_of(tree: Tree, seq_ids: range) -> list[list[int]]:
    rows = tree_rows(tree, seq_ids)
    return [rows.ids[node, : rows.counts[node]].tolist() for node in range(len(tree))]


def test_each_node_has_the_ids_of_the_leaves_under_it() -> None:
    assert ids_of(TREE, range(4, 8)) == [[4, 5, 6, 7], [5, 6], [4], [6], [5], [6]], (
        "the root has the spare id too"
    )


def test_a_row_sees_its_ancestors_alone() -> None:
    base = FakeBase(n_seq_max=3)
    base.place(0, list(range(10, 16)), TREE.depth_list, tree_rows(TREE, range(3)))
    rows = list(base._batch)
    base.cells += rows
    seen = [base.seen(row)[:-1] for row in rows]
    expected = [[10 + at for at in TREE.path_to(node)[:-1]] for node in range(len(TREE))]
    assert seen == expected


@pytest.mark.parametrize("alone", [True, False], ids=["own context", "shared context"])
@pytest.mark.parametrize("node", range(len(TREE)))
@pytest.mark.parametrize("tree", [TREE, Tree.chain(5), Tree.product([3, 2])], ids=repr)
def test_roll_back_leaves_the_accepted_path_in_every_id(tree: Tree, node: int, alone: bool) -> None:
    seq_ids = range(len(tree.leaves) + 1)  # one more than the tree needs
    base = FakeBase(n_seq_max=len(seq_ids) if alone else 64)
    base.prefill(np.array([1, 2, 3], np.int32), 0, 0)
    for seq_id in seq_ids[1:]:
        base.seq_cp(0, seq_id, 0, 3)
    if not alone:
        base.prefill(np.array([7, 8, 9, 7, 8, 9], np.int32), 0, 63)
    tokens = list(range(10, 10 + len(tree)))
    n = base.place(0, tokens, [3 + depth for depth in tree.depth_list], tree_rows(tree, seq_ids))
    base.decode_placed(n)
    roll_back(base, seq_ids, 3, tree, node)
    accepted = [tokens[at] for at in tree.path_to(node)]
    for seq_id in seq_ids:
        assert base.text_of(seq_id) == [1, 2, 3, *accepted]
    assert len(base.cells) == 3 + len(accepted) + (0 if alone else 6), (
        "rejected cells are free, the path is there once"
    )
    assert alone or base.text_of(63) == [7, 8, 9, 7, 8, 9]
