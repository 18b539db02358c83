"""Fast drafting with Hydra heads: level by level down the trees, one pass per level for all.

A pass holds the nodes that have children, and no others. Where each node's inputs and outputs are
depends on the trees alone, is worked out once and kept. Knows nothing of acceptance and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.heads.drafter import Float32Array, HeadsDrafter, Int32Array, MedusaDrafter, rows_of
from model.heads.fast import Call, compiled, linear
from model.heads.hydra import HydraHeads
from model.heads.medusa import MedusaHeads
from model.trees.tree import Tree

IndexArray = npt.NDArray[np.intp]


def drafter_for(heads: MedusaHeads, **options: Any) -> MedusaDrafter | HydraDrafter:
    """Return the drafter for heads of either type; options: see HeadsDrafter."""
    if isinstance(heads, HydraHeads):
        return HydraDrafter(heads, **options)
    return MedusaDrafter(heads, **options)


class HydraDrafter(HeadsDrafter):
    """Drafts with Hydra heads; a `RankingDrafter` of `model/decoding/drafters/drafter.py`."""

    def rank(
        self, hidden: Float32Array, tokens: npt.NDArray[np.integer]
    ) -> tuple[Int32Array, Float32Array | None]:
        """Return for states (B,D) each head's tokens (B,K,R) and their probabilities or None.

        The best come first. tokens: (B,K) those behind each state, of which a head reads the ones
        before its own.
        """
        states = torch.from_numpy(hidden)
        known = torch.from_numpy(tokens.astype(np.int64))
        best = list[Int32Array]()
        probabilities = list[Float32Array]()
        for k, head in enumerate(self._heads):
            head_best, head_probabilities = self._ranked(
                head(states, known[:, : k + 1]), self._ranks
            )
            best.append(head_best)
            if head_probabilities is not None:
                probabilities.append(head_probabilities)
        if not probabilities:
            return np.stack(best, 1), None
        return np.stack(best, 1), np.stack(probabilities, 1)

    def look(
        self, hidden: Float32Array, states: Sequence[int], paths: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See LevelDrafter."""
        rows = hidden if len(hidden) == 1 else hidden[list(states)]
        head = self._heads[len(paths[0]) - 1]
        return self._likeliest(head(torch.from_numpy(rows), torch.tensor(paths)))

    def draft(
        self, hidden: Float32Array, roots: Sequence[int], trees: Sequence[Tree]
    ) -> list[list[int]]:
        """See TreeDrafter."""
        starts, levels = _walk(tuple(trees))
        tokens = np.zeros(starts[-1], np.int64)  # of all trees, one behind the other
        tokens[starts[:-1]] = roots
        for level, head in zip(levels, self._heads, strict=False):
            # A single state is broadcast.
            states = hidden if len(hidden) == 1 else hidden[level.states]
            logits = head(torch.from_numpy(states), torch.from_numpy(tokens[level.paths]))
            best, _ = self._ranked(logits, level.n_ranks)
            tokens[level.nodes] = best[level.rows, level.ranks]
        flat = tokens.tolist()
        return [flat[start + 1 : end] for start, end in pairwise(starts.tolist())]

    def _one_row(self, heads: MedusaHeads, rows: Int32Array, dtype: str) -> Callable[[], object]:
        assert isinstance(heads, HydraHeads)
        last = self._n_heads - 1
        call = _compile(heads, last, _lm_head(heads, last, rows, dtype), dtype)
        states = torch.randn(1, heads.config.dim)
        tokens = torch.zeros((1, last + 1), dtype=torch.int64)
        return partial(call, states, tokens)

    def _prepare(self, heads: MedusaHeads) -> None:
        assert isinstance(heads, HydraHeads)
        self._heads = list[Call]()
        lm_head: nn.Module | None = None
        for k in range(self._n_heads):
            if lm_head is None or heads.config.lm_head == "own":
                lm_head = _lm_head(heads, k, self._rows, self.dtype)
            self._heads.append(_compile(heads, k, lm_head, self.dtype))


class _Head(nn.Module):
    """The head with index k (from 0), in one type throughout.

    States (n,D) or (1,D) and the tokens behind them (n,k+1) to logits (n,V).
    """

    embeddings: Tensor

    def __init__(self, heads: HydraHeads, k: int, lm_head: nn.Module, dtype: str) -> None:
        super().__init__()
        weight = heads.weight.detach()[:, k]  # (L,H,D)
        bias = heads.bias.detach()[:, k]  # (L,H)
        up = None if heads.up is None else heads.up.detach()[:, k]  # (L,D,H)
        self.kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        # A buffer: as a plain attribute each head would get a copy.
        self.register_buffer("embeddings", heads.embeddings)
        self.reader = linear(heads.reader(k), None, dtype)
        self.blocks = nn.ModuleList()
        self.ups = nn.ModuleList()
        for layer in range(heads.config.head_layers):
            self.blocks.append(linear(weight[layer], bias[layer], dtype))
            self.ups.append(nn.Identity() if up is None else linear(up[layer], None, dtype))
        self.lm_head = lm_head

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        embedded = F.embedding(tokens, self.embeddings).flatten(1)  # (n,(k+1)·D)
        x = states.to(self.kind) + self.reader(embedded.to(self.kind))
        for block, up in zip(self.blocks, self.ups, strict=True):
            x = x + up(F.silu(block(x)))
        return cast(Tensor, self.lm_head(x)).float()


def _lm_head(heads: HydraHeads, k: int, rows: Int32Array, dtype: str) -> nn.Module:
    return linear(rows_of(heads.lm_head_weight(k).detach(), rows), None, dtype)


def _compile(heads: HydraHeads, k: int, lm_head: nn.Module, dtype: str) -> Call:
    states = torch.randn(2, heads.config.dim)
    tokens = torch.zeros((2, k + 1), dtype=torch.int64)
    return compiled(_Head(heads, k, lm_head, dtype), states, tokens)


class _Level(NamedTuple):
    """One pass: the n nodes of a depth that have children, and these children, m in all.

    The tokens of all nodes are kept in one long row, into which `paths` and `nodes` are indices.
    states: (n,) which state a node reads. paths: (n,depth+1) the tokens from the root to it.
    nodes: (m,) where the children's tokens go. rows: (m,) which of the n nodes is their parent.
    ranks: (m,) which of its guesses they are. n_ranks: how many guesses are needed of a node.
    """

    states: IndexArray
    paths: IndexArray
    nodes: IndexArray
    rows: IndexArray
    ranks: IndexArray
    n_ranks: int


@lru_cache(maxsize=1024)
def _walk(trees: tuple[Tree, ...]) -> tuple[IndexArray, list[_Level]]:
    """Return where each tree's tokens begin (and the end), and the levels of all trees together."""
    starts = np.cumsum([0, *(len(tree) for tree in trees)])
    levels = list[_Level]()
    for depth in range(max(tree.max_depth for tree in trees)):
        deep = [i for i, tree in enumerate(trees) if depth < tree.max_depth]
        parts = [_levels(trees[i])[depth] for i in deep]
        first_rows = np.cumsum([0, *(len(part.paths) for part in parts)])[:-1].tolist()
        level = _Level(
            states=np.concatenate([part.states + i for i, part in zip(deep, parts, strict=True)]),
            paths=np.concatenate(
                [part.paths + starts[i] for i, part in zip(deep, parts, strict=True)]
            ),
            nodes=np.concatenate(
                [part.nodes + starts[i] for i, part in zip(deep, parts, strict=True)]
            ),
            rows=np.concatenate(
                [part.rows + first for first, part in zip(first_rows, parts, strict=True)]
            ),
            ranks=np.concatenate([part.ranks for part in parts]),
            n_ranks=max(part.n_ranks for part in parts),
        )
        levels.append(level)
    return starts, levels


@lru_cache(maxsize=1024)
def _levels(tree: Tree) -> list[_Level]:
    """Return the levels of a tree that is drafted alone."""
    levels = list[_Level]()
    for depth in range(tree.max_depth):
        at_depth = np.flatnonzero(tree.depths == depth).tolist()
        inner = [node for node in at_depth if tree.children[node]]
        row_of = {node: row for row, node in enumerate(inner)}
        nodes = np.flatnonzero(tree.depths == depth + 1)
        ranks = tree.ranks[nodes].astype(np.intp)
        level = _Level(
            states=np.zeros(len(inner), np.intp),
            paths=np.array([tree.path_to(node) for node in inner]),
            nodes=nodes,
            rows=np.array([row_of[parent] for parent in tree.parents[nodes].tolist()]),
            ranks=ranks,
            n_ranks=int(ranks.max()) + 1,
        )
        levels.append(level)
    return levels
