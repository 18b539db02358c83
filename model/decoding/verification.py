"""Which drafted nodes are accepted: the base model's own choice decides at each node.

Knows no cache and no clock. `verify_typically` is Medusa's other rule, which is lossy: what it
accepts is only likely enough.

Exact for greedy decoding and for sampling alike: at every node the base model's token is chosen as
plain decoding would choose it, and a child is accepted when it is that token.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model.decoding.sampling import COLD, Sampler
from model.trees.tree import Tree

THRESHOLD = 0.09  # upstream's posterior_threshold
ALPHA = 0.3  # upstream's posterior_alpha


def verify(
    tree: Tree,
    tokens: list[int],
    logits: npt.NDArray[np.float32],
    sampler: Sampler,
    *,
    index: int,
    ends_with: Callable[[int], bool],
    room: int,
) -> tuple[int, list[int]]:
    """Walk down from the root while the chosen token is among the children.

    tokens: (N,) the drafted tokens, the root's first; logits: (N, V); index: how many new tokens
    the sequence has; ends_with(token) says whether it ends with it; room: how many tokens it may
    still get, at least one. Returns (last accepted node, emitted tokens: one per accepted node and
    the base model's own).
    """
    node = 0
    emitted = list[int]()
    while True:
        token = sampler.choose(logits[node], index + len(emitted))
        emitted.append(token)
        if sampler.follows:
            sampler.take(token)
        if ends_with(token) or len(emitted) == room:
            return node, emitted
        child = tree.child_with(node, token, tokens)
        if not child:
            return node, emitted
        node = child


def verify_typically(
    tree: Tree,
    tokens: list[int],
    logits: npt.NDArray[np.float32],
    sampler: Sampler,
    *,
    index: int,
    ends_with: Callable[[int], bool],
    room: int,
) -> tuple[int, list[int]]:
    """Accept the longest path whose tokens are all typical, then choose as `verify` does: lossy.

    A token is typical where its probability exceeds min(THRESHOLD, ALPHA · exp(-entropy)) (Medusa,
    arXiv 2401.10774, section 2.3.1). Takes and returns what `verify` does; for greedy samplers, and
    those that follow the tokens, it is `verify`.
    """
    if sampler.params.temperature < COLD or sampler.follows:
        return verify(tree, tokens, logits, sampler, index=index, ends_with=ends_with, room=room)
    path = tree.path_to(_typical_leaf(tree, tokens, logits, sampler))
    emitted = list[int]()
    for parent, node in pairwise(path):
        emitted.append(tokens[node])
        if ends_with(tokens[node]) or len(emitted) == room:
            return parent, emitted
    last = path[-1]
    token = sampler.choose(logits[last], index + len(emitted))
    emitted.append(token)
    ends_with(token)
    return last, emitted


def _typical_leaf(
    tree: Tree, tokens: list[int], logits: npt.NDArray[np.float32], sampler: Sampler
) -> int:
    """Return the end of the deepest path of typical tokens; of equally deep ones the likeliest."""
    best = (0, 0.0)  # depth and log probability
    leaf = 0
    waiting = [(0, 0.0)]
    while waiting:
        node, so_far = waiting.pop()
        if (tree.depth_list[node], so_far) > best:
            best = (tree.depth_list[node], so_far)
            leaf = node
        if not tree.children[node]:
            continue
        shares = sampler.log_shares(logits[node])
        likely = shares[np.isfinite(shares)]
        entropy = -float((np.exp(likely) * likely).sum())
        least = min(np.log(THRESHOLD), np.log(ALPHA) - entropy)
        for child in tree.children[node]:
            share = float(shares[tokens[child]])
            if share > least:
                waiting.append((child, so_far + share))
    return leaf
