"""The search for the tree that pays.

Held against all trees, against Sequoia's programme and against false prices.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt
import pytest

from model.errors import UsageError
from model.trees.search import all_choices, best_tree, expected_lengths, grow
from model.trees.tree import RankPath, Tree

FloatArray = npt.NDArray[np.float64]
# t(n)/t(1) of 1 B parameters on two AVX-512 cores; 5 and 7 are filled in
Q4_0 = [1.0, 1.61, 2.28, 1.62, 2.3, 2.97, 2.9, 2.86]
GOOD = np.array([[0.7, 0.1, 0.05], [0.6, 0.1, 0.05], [0.5, 0.1, 0.05]])


def random_table(seed: int) -> FloatArray:
    """(K, R) accuracies whose rows sum to 1 at the most: also sorted, with zeros, with ties."""
    rng = np.random.default_rng(seed)
    heads = rng.integers(1, 5)
    ranks = rng.integers(1, 6)
    table = rng.dirichlet(np.full(ranks + 1, rng.uniform(0.2, 2.0)), heads)[:, :-1]
    if seed % 4 == 0:
        table = np.sort(table)[:, ::-1]
    if seed % 4 == 1:
        table[rng.random(table.shape) < 0.2] = 0.0
    if seed % 4 == 2:
        table = np.floor(table * 4) / 4
    return table


def sequoia(table: FloatArray, n_max: int) -> FloatArray:
    """(n_max,) the most expected tokens of any tree of at most n nodes with the root.

    After Sequoia (arXiv 2402.12374): T_d(n) = 1 + the best split of n - 1 nodes among the ranks of
    depth d + 1, where j nodes under rank r add accuracy[d, r] · T_{d+1}(j).
    """
    below = np.ones(n_max)  # T_K: no more heads; below[j - 1] is for j nodes
    for row in table[::-1]:
        split = np.zeros(n_max)  # split[m]: the best of m nodes among the ranks seen so far
        for accuracy in row:
            added = accuracy * below
            split = np.array(
                [
                    max([split[m], *(added[j - 1] + split[m - j] for j in range(1, m + 1))])
                    for m in range(n_max)
                ]
            )
        below = 1 + split
    return below


def every_tree(heads: int, ranks: int, depth: int = 0) -> Iterator[list[RankPath]]:
    """Yield all sets of rank paths that hold every parent.

    Each rank is absent, or heads a subtree of its own.
    """
    if depth == heads:
        yield []
        return
    under = [None, *every_tree(heads, ranks, depth + 1)]
    for subtrees in product(under, repeat=ranks):
        yield [
            (r, *path) for r, sub in enumerate(subtrees) if sub is not None for path in ((), *sub)
        ]


def expected(table: FloatArray, paths: list[RankPath]) -> float:
    return float(1 + sum(prod(table[d, r] for d, r in enumerate(path)) for path in paths))


def price(steps: FloatArray, draft: FloatArray, paths: list[RankPath]) -> float:
    depth = max(map(len, paths), default=0)
    draft_s = draft[depth - 1] if depth else 0.0
    return float(steps[len(paths)] + draft_s)


def test_growth_is_sequoias_optimum() -> None:
    """Exactly, not within 1 %: where acceptance depends on depth and rank alone."""
    wider = 0
    for seed in range(200):
        table = random_table(seed)
        paths = grow(table, 17)
        found = expected_lengths(table, paths)
        optimum = sequoia(table, 18)
        np.testing.assert_allclose(found, optimum[: len(found)], rtol=1e-12)
        if len(found) < 18:  # no likely node was left out
            assert optimum[-1] == pytest.approx(found[-1], rel=1e-12)
        chain = Tree.chain(len(table)).paths[1:]
        of_chain = expected_lengths(table, chain)[: 3 + 1][-1]
        if sequoia(table, 4)[-1] > 1.01 * of_chain:
            wider += 1
    assert wider > 100  # the oracle tells trees from chains: it can fail


def test_every_prefix_of_a_growth_is_a_tree_without_hopeless_nodes() -> None:
    for seed in range(200):
        table = random_table(seed)
        paths = grow(table, 17)
        for m in range(len(paths) + 1):
            assert len(Tree(paths[:m])) == m + 1
        assert all(prod(table[d, r] for d, r in enumerate(path)) > 0 for path in paths)


def test_expected_length_is_the_mean_over_all_outcomes() -> None:
    """At each depth one rank is right or none: walk the tree for each outcome, and weigh."""
    table = np.array([[0.3, 0.45], [0.5, 0.2], [0.1, 0.6]])
    tree = Tree([(0,), (1,), (1, 0), (1, 1), (0, 1), (1, 0, 1)])
    mean = 0.0
    for outcome in product((0, 1, None), repeat=3):
        chances = [1 - table[d].sum() if r is None else table[d, r] for d, r in enumerate(outcome)]
        length = 1
        while length <= 3 and outcome[:length] in tree.paths:
            length += 1
        mean += length * prod(chances)
    assert expected_lengths(table, tree.paths[1:])[-1] == pytest.approx(mean, rel=1e-12)


def test_expected_lengths_node_by_node() -> None:
    lengths = expected_lengths([[0.5, 0.25], [0.5, 0.0]], [(0,), (0, 0), (1,)])
    assert lengths.tolist() == [1.0, 1.5, 1.75, 2.0]
    assert expected_lengths([[0.5]], []).tolist() == [1.0]


def test_ties_go_to_the_shallower_then_to_lower_ranks() -> None:
    assert grow([[0.5, 0.5], [0.5, 0.5]], 4) == [(0,), (1,), (0, 0), (0, 1)]
    assert grow([[1.0], [1.0], [1.0]], 5) == [(0,), (0, 0), (0, 0, 0)]
    assert grow([[0.5, 0.25], [0.5, 0.0]], 9) == [(0,), (1,), (0, 0), (1, 0)]
    even = best_tree([[0.5, 0.25], [0.5, 0.0]], [1.0, 1.3, 1.4], draft_seconds=0.0, max_nodes=3)
    assert even.tree.paths == Tree.chain(2).paths  # [0], [1] earns as much, with two leaves
    assert even.expected_length == 1.75


def test_a_better_later_rank_comes_first_under_its_own_name() -> None:
    assert grow([[0.1, 0.6, 0.3], [0.0, 0.9, 0.05]], 4) == [(1,), (1, 1), (2,), (2, 1)]


def test_the_best_tree_earns_more_than_any_other() -> None:
    """Against all 676 trees of 3 heads and 2 ranks.

    Times jump, and drafting costs by depth.
    """
    trees = list(every_tree(3, 2))
    assert len(trees) == 676 and len({tuple(sorted(t)) for t in trees}) == 676
    sizes = set()
    depths = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = rng.dirichlet((3.0, 1.0, 1.0), 3)[:, :2]
        rising = np.cumsum(rng.uniform(0, 0.1, 14))
        steps = np.concatenate([[1.0], 1.0 + rising + rng.uniform(0, 0.4, 14)])
        draft = np.cumsum(rng.uniform(0, rng.uniform(0, 2), 3))
        best = best_tree(table, steps, draft_seconds=draft, max_nodes=15)
        rates = [expected(table, t) / price(steps, draft, t) for t in trees]
        assert best.tokens_per_s == pytest.approx(max(rates), rel=1e-12)
        mine = list(best.tree.paths[1:])
        assert best.expected_length == pytest.approx(expected(table, mine))
        assert best.seconds == price(steps, draft, mine)
        assert best.speedup == pytest.approx(best.tokens_per_s * steps[0])
        sizes.add(len(best.tree))
        depths.add(best.tree.max_depth)
    assert len(sizes) > 4 and depths == {0, 1, 2, 3}  # the sixty worlds differ


def test_nothing_is_drafted_where_each_token_costs_as_much_as_the_first() -> None:
    for accuracies in (GOOD, [[1.0]], np.zeros((0, 3)), np.zeros((3, 0)), [[0.0, 0.0]]):
        steps = 0.013 * np.arange(1, 9)  # (1 / 0.013) · 0.013 is not 1
        best = best_tree(accuracies, steps, draft_seconds=0.0, max_nodes=8)
        assert len(best.tree) == 1
        assert (best.expected_length, best.seconds, best.speedup) == (1.0, 0.013, 1.0)
    free = best_tree(GOOD, 0.013 * np.ones(8), draft_seconds=0.0, max_nodes=8)
    assert len(free.tree) == 8 and free.speedup > 2


def test_four_nodes_rather_than_three_where_four_are_faster() -> None:
    best = best_tree(GOOD, Q4_0, draft_seconds=0.05, max_nodes=8)
    assert best.tree.paths == Tree.chain(3).paths and len(best.tree) == 4
    smoothed = [1.0, 1.61, 2.28, 2.9, 3.5, 4.1, 4.7, 5.3]
    assert len(best_tree(GOOD, smoothed, draft_seconds=0.05, max_nodes=8).tree) != 4
    by_size = all_choices(GOOD, Q4_0, draft_seconds=0.05, max_nodes=8)
    assert by_size[3].speedup > 1 > by_size[2].speedup
    assert best_tree(GOOD, Q4_0[:3], draft_seconds=0.05, max_nodes=3).tree.paths == ((), (0,))


def test_dearer_drafting_means_other_trees_then_none() -> None:
    steps = 1 + 0.06 * np.arange(15)
    chosen = [best_tree(GOOD, steps, draft_seconds=d, max_nodes=15) for d in (0.0, 0.5, 2.0)]
    free, some, none = (len(c.tree) for c in chosen)
    assert some > free > 1 and none == 1  # what is paid for anyway is better used
    speedups = [c.speedup for c in chosen]
    assert speedups == sorted(speedups, reverse=True) and speedups[2] == 1.0
    assert chosen[1].seconds == pytest.approx(steps[some - 1] + 0.5)


def test_a_search_blind_to_the_price_of_depth_would_be_found_out() -> None:
    steps = np.linspace(1.0, 1.3, 15)
    draft = np.array([0.0, 0.05, 0.9])
    best = best_tree(GOOD, steps, draft_seconds=draft, max_nodes=15)
    blind = best_tree(GOOD, steps, draft_seconds=0.0, max_nodes=15)
    assert best.tree.max_depth == 2 and blind.tree.max_depth == 3
    blind_rate = blind.expected_length / price(steps, draft, list(blind.tree.paths[1:]))
    assert blind_rate < 0.8 * best.tokens_per_s
    # Beginnings of one growth do not suffice either: it goes deep before it goes wide.
    cut = grow(GOOD, 14)
    lengths = expected_lengths(GOOD, cut)
    cut_rates = [lengths[m] / price(steps, draft, cut[:m]) for m in range(15)]
    assert max(cut_rates) < 0.999 * best.tokens_per_s


def test_one_choice_per_size_and_the_best_is_among_them() -> None:
    steps = 1 + 0.07 * np.arange(20)
    choices = all_choices(GOOD, steps, draft_seconds=[0.1, 0.11, 0.3], max_nodes=12)
    assert [len(c.tree) for c in choices] == list(range(1, 13)) and choices[0].speedup == 1.0
    best = best_tree(GOOD, steps, draft_seconds=[0.1, 0.11, 0.3], max_nodes=12)
    assert best.tokens_per_s == max(c.tokens_per_s for c in choices)
    assert best.tree.paths == max(choices, key=lambda c: c.tokens_per_s).tree.paths
    for c in choices:
        assert c.expected_length == pytest.approx(expected(GOOD, list(c.tree.paths[1:])), rel=1e-12)


def test_sizes_end_where_nothing_likely_remains_and_skip_what_is_not_on_offer() -> None:
    few = all_choices([[0.5, 0.0], [0.5, 0.0]], np.ones(9), draft_seconds=0.0, max_nodes=9)
    assert [len(c.tree) for c in few] == [1, 2, 3]
    steps = np.array([1.0, np.inf, np.inf, 1.1, np.inf, 1.2])
    measured = all_choices(GOOD, steps, draft_seconds=0.0, max_nodes=6)
    assert [len(c.tree) for c in measured] == [1, 4, 6]


def test_caps_on_nodes_and_leaves_hold() -> None:
    flat = np.full((3, 10), 0.09)
    assert len(best_tree(flat, np.ones(40), draft_seconds=0.0, max_nodes=23).tree) == 23
    for leaves in (1, 2, 5):
        for seed in range(40):
            table = random_table(seed)
            paths = grow(table, 30, max_leaves=leaves)
            assert len(Tree(paths).leaves) <= leaves
            depth = next((d for d, row in enumerate(table) if not row.any()), len(table))
            assert len(paths) >= depth  # a chain needs one leaf
            choices = all_choices(
                table, np.ones(31), draft_seconds=0.0, max_nodes=31, max_leaves=leaves
            )
            assert all(len(c.tree.leaves) <= leaves for c in choices)
    assert len(Tree(grow(np.full((1, 300), 0.003), 300)).leaves) == 256


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ([0.5, 0.2], r"shape \(2,\)"),
        ([[0.5, 1.5]], "1.5 is not"),
        ([[-0.1]], "-0.1 is not"),
        ([[float("nan")]], "nan is not"),
        ([[0.5], [0.5, 0.2]], "not a table"),
        ([["x"]], "not a table"),
    ],
)
def test_bad_accuracies_are_refused_by_value(accuracies: list[list[float]], said: str) -> None:
    with pytest.raises(UsageError, match=f"accuracies.*{said}"):
        grow(accuracies, 3)
    with pytest.raises(UsageError, match=f"accuracies.*{said}"):
        best_tree(accuracies, np.ones(4), draft_seconds=0.0, max_nodes=4)


@pytest.mark.parametrize("path", [(), (3,), (0, 0, 0, 0), (-1,)])
def test_a_path_outside_of_the_accuracies_is_refused(path: RankPath) -> None:
    with pytest.raises(UsageError, match="outside"):
        expected_lengths(GOOD, [(0,), path])


@pytest.mark.parametrize(
    ("steps", "draft"),
    [([1.0, 0.0], 0.0), ([1.0, float("nan")], 0.0), ([1.0], 0.0), ([1.0, 1.0], [0.1])],
)
def test_impossible_times_are_a_mistake(steps: list[float], draft: float | list[float]) -> None:
    with pytest.raises(AssertionError):
        best_tree(GOOD, steps, draft_seconds=draft, max_nodes=2)
