"""Which drafted nodes stand: the base model's own choice decides at each node. Knows no cache and no clock.

Exact for greedy decoding and for sampling alike: at every node the base model's token is chosen as plain
decoding would choose it, and a child is accepted when it is that token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from model.decoding.sampling import Sampler
from model.trees.tree import Tree


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
        if ends(token) or len(won) == room:
            return node, won, True
        for child in tree.children[node]:
            if tokens[child] == token:
                node = child
                break
        else:
            return node, won, False
