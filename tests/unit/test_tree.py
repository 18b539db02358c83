"""Topology of draft trees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model.errors import UsageError
from model.trees.tree import Tree


def test_a_tree_of_rank_paths() -> None:
    t = Tree([(1,), (0,), (0, 1), (0, 0), (0, 0, 0)])
    assert t.paths == ((), (0,), (1,), (0, 0), (0, 1), (0, 0, 0))
    assert t.parents.tolist() == [-1, 0, 0, 1, 1, 3]
    assert t.depths.tolist() == [0, 1, 1, 2, 2, 3] and t.ranks.tolist() == [0, 0, 1, 0, 1, 0]
    assert t.leaves.tolist() == [2, 4, 5] and t.children[1] == [3, 4]
    assert (t.max_depth, t.n_ranks, len(t)) == (3, 2, 6)
    assert t.path_to(5) == (0, 1, 3, 5) and t.path_to(0) == (0,)


def test_node_tokens_come_from_a_table_of_guesses() -> None:
    t = Tree.product([2, 2])
    table = np.array([[10, 11, 12], [20, 21, 22]], np.int32)
    assert t.level_sizes == [2, 4] and t.fill(table) == [10, 11, 20, 21, 20, 21]


def test_a_chain_may_hang_under_any_node() -> None:
    t = Tree.product([2, 1])  # nodes 1, 2 at depth 1; 3, 4 under them
    longer = t.with_chain(1, 2)
    assert longer.paths == (*t.paths, (0, 1), (0, 1, 0))
    assert longer.parents.tolist() == [*t.parents.tolist(), 1, 5]
    assert t.with_chain(3, 1).paths[-1] == (0, 0, 0)
    assert t.with_chain(1, 2) is longer and t.with_chain(1, 0) is t


def test_shapes() -> None:
    assert Tree.chain(3).paths == ((), (0,), (0, 0), (0, 0, 0))
    assert len(Tree.product([3, 2])) == 1 + 3 + 6
    assert len(Tree([])) == 1 and Tree([]).max_depth == 0 and Tree([]).leaves.tolist() == [0]
    assert len(Tree.parse("2,2,1")) == 1 + 2 + 4 + 4
    assert len(Tree.parse("4")) == 5
    assert len(Tree.parse("0")) == 1


def test_a_file_of_rank_paths(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps([[0], [0, 0], [1]]))
    assert Tree.parse(str(tmp_path / "t.json")).paths == ((), (0,), (1,), (0, 0))


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([(0, 0)], r"\[0, 0\] has no parent \[0\]"),
        ([(0,), (0,)], r"\[0\] is given twice"),
        ([(-1,)], "negative"),
        ([(i,) for i in range(257)], "257 leaves"),
    ],
)
def test_bad_trees_are_refused_by_name(paths: list[tuple[int, ...]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Tree(paths)


@pytest.mark.parametrize(
    "text", ["", "x", "2,0", "0,2", "2,,1", "300,2", "999", "-1", "²", "no.json"]
)
def test_bad_descriptions_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="tree"):
        Tree.parse(text)


@pytest.mark.parametrize(
    "text", ['[[0], ["x"]]', "[[0.9]]", "[[true]]", "[" * 100_000, "3", "[[0]"]
)
def test_a_damaged_tree_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match=r"t\.json"):
        Tree.parse(str(tmp_path / "t.json"))
