"""The draft tree by which epochs are compared: as many nodes as pay here, on held-out positions.

The tree is the one that `tune` would choose of its size, and its acceptance is counted position by
position, not computed from rates. Heads see true tokens behind each position, so the rank of a
wanted token is the one that drafting gives it once the path before is right. Knows no heads and no
clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from model.trees.costs import CostCurve
from model.trees.search import best_tree, grow

# With the root, where nothing is known to pay: heads may be trained here and used elsewhere.
NODES = 16
MAX_NODES = 64


def tuned_nodes(accuracies: Sequence[Sequence[float]], curve: CostCurve | None) -> int:
    """Return the nodes, root included, of the tree with most tokens per second."""
    if curve is None:
        return NODES
    seconds = curve.on_offer(curve.contexts[0], min(MAX_NODES, curve.sizes[-1]))
    nodes = len(best_tree(accuracies, seconds, draft_seconds=0.0, max_nodes=len(seconds)).tree)
    return nodes if nodes > 1 else NODES


def simulated_length(
    accuracies: Sequence[Sequence[float]], ranks: npt.NDArray[np.int8], nodes: int
) -> float:
    """Return the tokens per step, the base model's own included, of the best tree of so many nodes.

    accuracies: (K, R), which decide the tree; ranks: (n, K), which guess of each head is right, R
    or more for none of these, -1 where nothing is known: such positions count as far as they go.
    """
    paths = [(), *grow(accuracies, nodes - 1)]
    index = {path: i for i, path in enumerate(paths)}
    lost = len(paths)  # where a rank leads that the tree doesn't hold
    n_ranks = len(accuracies[0])
    # The node that a rank leads to from a node.
    child = np.full((len(paths) + 1, n_ranks + 1), lost)
    for path in paths[1:]:
        child[index[path[:-1]], path[-1]] = index[path]
    node = np.zeros(len(ranks), np.int64)  # where each position has come to, the root at first
    known = np.ones(len(ranks), np.bool_)
    length = 1.0
    for column in ranks.T:  # depth by depth
        known &= column >= 0
        node = child[node, np.clip(column, 0, n_ranks)]
        if known.any():
            length += float((node[known] != lost).mean())
    return length
