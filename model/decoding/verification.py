"""Which drafted nodes stand: the base model's own choice decides at each node. Knows no cache and no clock.

Exact for greedy decoding and for sampling alike: at every node the base model's token is chosen as plain
decoding would choose it, and a child is accepted when it is that token.
"""

from __future__ import annotations

from collections.abc import Callable

from model.trees.tree import Tree


def verify(
    tree: Tree, tokens: list[int], choose: Callable[[int, int], int], ends: Callable[[int], bool]
) -> tuple[int, list[int]]:
    """Walk down from the root while the chosen token is among the children.

    tokens: (N,) the drafted tokens, the root's first; choose(node, i) gives the i-th new token from a
    node's logits; ends(token) says whether the text ends with it.
    Returns (last accepted node, tokens emitted: one per accepted node and the base model's own).
    """
    node, emitted = 0, list[int]()
    while True:
        token = choose(node, len(emitted))
        emitted.append(token)
        if ends(token):
            return node, emitted
        for child in tree.children[node]:
            if tokens[child] == token:
                node = child
                break
        else:
            return node, emitted
