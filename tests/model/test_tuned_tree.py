"""The tree that epochs are compared by: its size follows the prices, its length is counted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from model.training.tuned_tree import NODES, simulated_length, tuned_nodes
from model.trees.costs import CostCurve
from model.trees.search import expected_lengths, grow
from model.trees.tree import Tree

RATES = [[0.6, 0.2, 0.05], [0.5, 0.2, 0.05], [0.4, 0.1, 0.05]]


def drawn(n: int, seed: int = 0) -> npt.NDArray[np.int8]:
    """Ranks (n, K) drawn by RATES, each head on its own; 3 for none."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(4, n, p=[*row, 1 - sum(row)]) for row in RATES], 1).astype(np.int8)


def test_length_is_counted_along_each_positions_path() -> None:
    ranks = drawn(500)
    ranks[::7, 2] = -1
    ranks[::11, 1:] = -1
    found = simulated_length(RATES, ranks, 9)
    tree = set(grow(RATES, 8))
    wanted = 1.0
    for depth in (1, 2, 3):
        known = [tuple(row[:depth]) for row in ranks.tolist() if min(row[:depth]) >= 0]
        wanted += sum(path in tree for path in known) / len(known)
    assert found == pytest.approx(wanted)
    assert len(Tree(tree)) == 9


def test_length_is_the_expected_one_where_heads_are_independent() -> None:
    """20,000 draws: four standard errors are below 0.03, one false alarm in 16,000; fixed seed."""
    expected = float(expected_lengths(RATES, grow(RATES, 8))[-1])
    assert simulated_length(RATES, drawn(20_000), 9) == pytest.approx(expected, abs=0.03)
    together = drawn(20_000)
    together[:, 1:] = together[:, :1]  # heads that are right together: rates alone would not tell
    assert abs(simulated_length(RATES, together, 9) - expected) > 0.1


def test_a_larger_tree_is_never_shorter_and_nothing_known_is_one() -> None:
    lengths = [simulated_length(RATES, drawn(500), nodes) for nodes in range(1, 20)]
    assert lengths[0] == 1.0 and lengths == sorted(lengths) and lengths[-1] > 2
    assert simulated_length(RATES, np.full((5, 3), -1, np.int8), 9) == 1.0
    assert simulated_length([[0.0] * 3] * 3, drawn(50), 9) == 1.0


def curve(*ratios: float) -> CostCurve:
    return CostCurve((64,), (1, 2, 4, 8), (ratios,))


def test_the_size_follows_the_prices() -> None:
    assert tuned_nodes(RATES, curve(1.0, 1.01, 1.02, 1.03)) == 8
    assert tuned_nodes(RATES, curve(1.0, 1.5, 1.2, 3.0)) == 4
    assert tuned_nodes(RATES, curve(1.0, 2.0, 4.0, 8.0)) == NODES  # nothing pays
    assert tuned_nodes(RATES, None) == NODES
