"""Fast drafting with Hydra heads: level by level down the trees, one pass per level for all of them.

A pass holds the nodes that have children, and no others. What stands where in it hangs on the trees alone, is worked
out once and kept. Knows nothing of acceptance and llama.cpp.
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

from model.heads.drafter import Float32Array, HeadsDrafter, Int32Array, MedusaDrafter
from model.heads.fast import compiled, linear
from model.heads.hydra import HydraHeads
from model.heads.medusa import MedusaHeads
from model.trees.tree import Tree

IndexArray = npt.NDArray[np.intp]


def drafter_for(heads: MedusaHeads, **options: Any) -> MedusaDrafter | HydraDrafter:
    """Return the drafter for heads of either type; options: see HeadsDrafter."""
    return HydraDrafter(heads, **options) if isinstance(heads, HydraHeads) else MedusaDrafter(heads, **options)


class HydraDrafter(HeadsDrafter):
    """Drafts with Hydra heads; a `Drafter` of `model/decoding/drafting.py`."""

    def rank(self, hidden: Float32Array, tokens: npt.NDArray[np.integer]) -> tuple[Int32Array, Float32Array | None]:
        """Return for states (B,D), and the tokens (B,K) behind each, what every head makes of those before its own.

        Gives tokens (B,K,R), best first, and their probabilities or None.
        """
        states, known = torch.from_numpy(hidden), torch.from_numpy(tokens.astype(np.int64))
        found = [self._ranked(head(states, known[:, : k + 1]), self._ranks) for k, head in enumerate(self._heads)]
        probabilities = [each for _, each in found if each is not None]
        return np.stack([best for best, _ in found], 1), np.stack(probabilities, 1) if probabilities else None

    def draft(self, hidden: Float32Array, roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        """See Drafter."""
        starts, levels = _walk(tuple(trees))
        tokens = np.zeros(starts[-1], np.int64)  # of all trees, one behind the other
        tokens[starts[:-1]] = roots
        for level, head in zip(levels, self._heads, strict=False):
            states = hidden if len(hidden) == 1 else hidden[level.states]  # a single one is broadcast
            logits = head(torch.from_numpy(states), torch.from_numpy(tokens[level.paths]))
            best, _ = self._ranked(logits, level.most)
            tokens[level.nodes] = best[level.rows, level.ranks]
        flat, ends = tokens.tolist(), starts.tolist()
        return [flat[start + 1 : end] for start, end in pairwise(ends)]

    def _one_row(self, heads: MedusaHeads, ids: Int32Array, dtype: str) -> Callable[[], object]:
        assert isinstance(heads, HydraHeads)
        last = self._n_heads - 1
        example = torch.randn(1, heads.config.dim), torch.zeros((1, last + 1), dtype=torch.int64)
        return partial(_compile(heads, last, _lm_head(heads, last, ids, dtype), dtype), *example)

    def _prepare(self, heads: MedusaHeads) -> None:
        assert isinstance(heads, HydraHeads)
        self._heads = list[torch.jit.ScriptModule]()
        lm_head: nn.Module | None = None
        for k in range(self._n_heads):
            if lm_head is None or heads.config.lm_head == "own":
                lm_head = _lm_head(heads, k, self.ids, self.dtype)
            self._heads.append(_compile(heads, k, lm_head, self.dtype))


class _Head(nn.Module):
    """States (n,D) or (1,D) and the tokens behind them (n,k+1) to the logits (n,V) of the head with index k."""

    embeddings: Tensor

    def __init__(self, heads: HydraHeads, k: int, lm_head: nn.Module, dtype: str) -> None:
        super().__init__()
        layers = range(heads.config.head_layers)
        self.kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.register_buffer("embeddings", heads.embeddings)  # as a plain attribute each head would get a copy
        self.reader = linear(heads.reader(k), None, dtype)
        weight, bias = heads.weight.detach()[:, k], heads.bias.detach()[:, k]
        self.blocks = nn.ModuleList(linear(weight[i], bias[i], dtype) for i in layers)
        up = None if heads.up is None else heads.up.detach()[:, k]
        self.ups = nn.ModuleList(nn.Identity() if up is None else linear(up[i], None, dtype) for i in layers)
        self.lm_head = lm_head

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        read = F.embedding(tokens, self.embeddings).flatten(1)  # (n,(k+1)·D)
        x = states.to(self.kind) + self.reader(read.to(self.kind))
        for block, up in zip(self.blocks, self.ups, strict=True):
            x = x + up(F.silu(block(x)))
        return cast(Tensor, self.lm_head(x)).float()


def _lm_head(heads: HydraHeads, k: int, ids: Int32Array, dtype: str) -> nn.Module:
    weight = heads.lm_head_weight(k).detach()
    whole = len(ids) == heads.config.vocab
    return linear(weight if whole else weight[torch.from_numpy(ids.astype(np.int64))], None, dtype)


def _compile(heads: HydraHeads, k: int, lm_head: nn.Module, dtype: str) -> torch.jit.ScriptModule:
    example = torch.randn(2, heads.config.dim), torch.zeros((2, k + 1), dtype=torch.int64)
    return compiled(_Head(heads, k, lm_head, dtype), *example)


class _Level(NamedTuple):
    """One pass. Its n rows are the nodes of a depth that have children, m in all; tokens stand in one long row."""

    states: IndexArray  # (n,) which state a node reads
    paths: IndexArray  # (n,depth+1) where the tokens from the root to it stand
    nodes: IndexArray  # (m,) where the children's tokens go
    rows: IndexArray  # (m,) whose child
    ranks: IndexArray  # (m,) which of its guesses
    most: int  # guesses of a node


@lru_cache(maxsize=1024)
def _walk(trees: tuple[Tree, ...]) -> tuple[IndexArray, list[_Level]]:
    """Return where each tree's tokens begin (and the end), and the levels of trees that are drafted together."""
    starts = np.cumsum([0, *(len(tree) for tree in trees)])
    levels = list[_Level]()
    for depth in range(max(tree.max_depth for tree in trees)):
        parts = [(i, _levels(tree)[depth]) for i, tree in enumerate(trees) if depth < tree.max_depth]
        first = np.cumsum([0, *(len(part.paths) for _, part in parts)])
        levels.append(
            _Level(
                np.concatenate([part.states + i for i, part in parts]),
                np.concatenate([part.paths + starts[i] for i, part in parts]),
                np.concatenate([part.nodes + starts[i] for i, part in parts]),
                np.concatenate([part.rows + row for row, (_, part) in zip(first.tolist(), parts, strict=False)]),
                np.concatenate([part.ranks for _, part in parts]),
                max(part.most for _, part in parts),
            )
        )
    return starts, levels


@lru_cache(maxsize=1024)
def _levels(tree: Tree) -> list[_Level]:
    """Return the levels of a tree that is drafted alone."""
    levels = list[_Level]()
    for depth in range(tree.max_depth):
        inner = [n for n in np.flatnonzero(tree.depths == depth).tolist() if tree.children[n]]
        row_of, nodes = {n: row for row, n in enumerate(inner)}, np.flatnonzero(tree.depths == depth + 1)
        ranks = tree.ranks[nodes].astype(np.intp)
        rows = np.array([row_of[parent] for parent in tree.parents[nodes].tolist()])
        paths = np.array([tree.path_to(n) for n in inner])
        levels.append(_Level(np.zeros(len(inner), np.intp), paths, nodes, rows, ranks, int(ranks.max()) + 1))
    return levels
