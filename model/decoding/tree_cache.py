"""A draft tree in the KV cache.

Which sequence ids each row carries, and how a rejected part is rolled back. llama.cpp has no tree
attention, but a cell may belong to many sequences, and a row sees the cells that share one with it.
So a sequence has as many ids as its tree has leaves, and each node carries those of the leaves
under it:

                       node   token  position  sequence ids      sees
    root ── a ── b     root   the    p         0 1 2             the prefix
         │    └─ c     a      cat    p + 1     0 1               the prefix, root
         └─ d          b      sat    p + 2     0                 the prefix, root, a
                       c      ran    p + 2     1                 the prefix, root, a
                       d      dog    p + 1     2                 the prefix, root

Every id holds the whole prefix before the step, and again after it. Say that a and c are accepted:
id 0 loses b and takes over c, id 2 loses d and takes over a and c. Nothing is copied: `seq_cp` adds
an id to cells, `seq_rm` takes one away, and a cell without any is free.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from model.base.llama import RowSeqIds
from model.trees.tree import Tree


class Cache(Protocol):
    """The KV cache of `model.base.llama.LlamaBase`.

    n_seq_max: sequence ids of the whole context.
    """

    n_seq_max: int

    def seq_rm(self, seq: int, start: int, end: int) -> None: ...  # noqa: D102
    def seq_cp(self, source: int, target: int, start: int, end: int) -> None: ...  # noqa: D102
    def state_bytes(self, seq: int) -> int: ...  # noqa: D102
    def save_state(self, seq: int) -> npt.NDArray[np.uint8]: ...  # noqa: D102
    def restore_state(self, seq: int, state: npt.NDArray[np.uint8]) -> bool: ...  # noqa: D102


class _Layout(NamedTuple):
    """under: (N, L), whether leaf l hangs under (or is) node n. leaf_depths: (L,).

    shared: for each node and each leaf, the depth down to which their paths are the same.
    """

    under: npt.NDArray[np.bool_]
    leaf_depths: list[int]
    shared: list[list[int]]


@lru_cache(maxsize=1024)
def _layout(tree: Tree) -> _Layout:
    leaves = tree.leaves.tolist()
    under = np.zeros((len(tree), len(leaves)), np.bool_)
    for i, leaf in enumerate(leaves):
        under[list(tree.path_to(leaf)), i] = True
    shared = np.zeros((len(tree), len(leaves)), np.int32)
    for node in range(1, len(tree)):
        shared[node] = np.where(under[node], tree.depths[node], shared[tree.parents[node]])
    return _Layout(under, [tree.depth_list[leaf] for leaf in leaves], shared.tolist())


@lru_cache(maxsize=1024)
def tree_rows(tree: Tree, seq_ids: range) -> RowSeqIds:
    """Give each node the sequence ids of all leaves under it, and the root every id."""
    assert len(tree.leaves) <= len(seq_ids), (
        f"{len(tree.leaves)} leaves, {len(seq_ids)} sequence ids"
    )
    under = _layout(tree).under
    counts = under.sum(1).astype(np.int32)
    counts[0] = len(seq_ids)
    ids = np.zeros((len(tree), len(seq_ids)), np.int32)
    for node in range(1, len(tree)):
        ids[node, : counts[node]] = seq_ids.start + np.flatnonzero(under[node])
    ids[0] = np.arange(seq_ids.start, seq_ids.stop)
    return RowSeqIds(counts, ids[:, : int(counts.max())])


def roll_back(cache: Cache, seq_ids: range, root: int, tree: Tree, node: int) -> None:
    """Leave the prefix, the root and the path to `node` in all ids, and nothing else.

    node: the last accepted one. root: the root's position. Each call scans all cells of the cache
    (3 to 30 µs a step at 1,000 of them), so what is equal already is left alone.
    """
    if len(tree) == 1:
        return
    accepted = tree.depth_list[node]
    _, leaf_depths, every_shared = _layout(tree)
    shared = every_shared[node]
    source = seq_ids.start + shared.index(accepted)  # an id whose path holds all that was accepted
    behind_root = root + 1

    # A sequence that has the whole cache loses everything below the accepted depth in one call.
    alone = len(seq_ids) == cache.n_seq_max
    if alone and tree.max_depth > accepted:
        cache.seq_rm(-1, behind_root + accepted, -1)

    for i, seq_id in enumerate(seq_ids):
        common = 0  # depth down to which this id's path was accepted
        reached = 0  # depth of its leaf
        if i < len(leaf_depths):
            common = shared[i]
            reached = leaf_depths[i]
        left = min(reached, accepted) if alone else reached
        if common < left:
            cache.seq_rm(seq_id, behind_root + common, behind_root + reached)
        if common < accepted:
            cache.seq_cp(source, seq_id, behind_root + common, behind_root + accepted)
