"""Which drafted nodes stand: the base model's own choice decides at each node. Knows no cache and no clock.

`verify_typically` is Medusa's other rule, which is lossy: what it lets stand is only likely enough.

Exact for greedy decoding and for sampling alike: at every node the base model's token is chosen as plain
decoding would choose it, and a child is accepted when it is that token.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model.decoding.sampling import COLD, Sampler
from model.trees.tree import Tree

THRESHOLD, ALPHA = 0.09, 0.3  # upstream's posterior_threshold and posterior_alpha


def verify(
    tree: Tree,
    tokens: list[int],
    logits: npt.NDArray[np.float32],
    sampler: Sampler,
    index: int,
    ends: Callable[[int], bool],
    room: int,
) -> tuple[int, list[int], bool]:
    """Walk down from the root while the chosen token is among the children.

    tokens: (N,) the drafted tokens, the root's first; logits: (N, V); index: how many tokens the text has won so
    far; ends(token) says whether the text ends with it; room: how many tokens it may still win, at least one.
    Returns (last accepted node, tokens won: one per accepted node and the base model's own, whether the text ended).
    """
    node, won = 0, list[int]()
    while True:
        token = sampler.choose(logits[node], index + len(won))
        won.append(token)
        if sampler.follows:
            sampler.take(token)
        if ends(token) or len(won) == room:
            return node, won, True
        child = tree.child_with(node, token, tokens)
        if not child:
            return node, won, False
        node = child


def verify_typically(
    tree: Tree,
    tokens: list[int],
    logits: npt.NDArray[np.float32],
    sampler: Sampler,
    index: int,
    ends: Callable[[int], bool],
    room: int,
) -> tuple[int, list[int], bool]:
    """Keep the longest path whose tokens are all typical, then choose as `verify` does: another distribution, lossy.

    A token is typical where its probability exceeds min(THRESHOLD, ALPHA · exp(-entropy)) (Medusa, section 2.3.1).
    Takes and returns what `verify` does; for greedy samplers, and those that follow the text, it is `verify`.
    """
    if sampler.params.temperature < COLD or sampler.follows:
        return verify(tree, tokens, logits, sampler, index, ends, room)
    best, last = (0, 0.0), 0  # depth and log probability of the path, and its end
    waiting = [(0, 0.0)]
    while waiting:
        node, so_far = waiting.pop()
        if (tree.depth_list[node], so_far) > best:
            best, last = (tree.depth_list[node], so_far), node
        if not tree.children[node]:
            continue
        shares = sampler.log_shares(logits[node])
        likely = shares[np.isfinite(shares)]
        entropy = -float((np.exp(likely) * likely).sum())
        least = min(np.log(THRESHOLD), np.log(ALPHA) - entropy)
        waiting += [(c, so_far + float(shares[tokens[c]])) for c in tree.children[node] if shares[tokens[c]] > least]
    path, won = tree.path_to(last), list[int]()
    for above, node in pairwise(path):
        won.append(tokens[node])
        if ends(tokens[node]) or len(won) == room:
            return above, won, True
    token = sampler.choose(logits[last], index + len(won))
    won.append(token)
    return last, won, ends(token) or len(won) == room
