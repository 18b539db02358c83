"""Draft trees: topology only. Which node hangs under which, by which guess; no tokens, no probabilities, no time.

A tree is a set of rank paths (upstream Medusa's `medusa_choices`): `(0, 1)` is the best guess of head 1,
then the second best of head 2. The root, the last decided token, is node 0 and the empty path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.errors import UsageError

Int32Array = npt.NDArray[np.int32]
RankPath = tuple[int, ...]
MAX_LEAVES = 256  # one sequence id per leaf, and llama.cpp has 256


class Tree:
    """The topology of one draft: N nodes with the root, in order of depth.

    in_order: the paths begin with the root, stand behind their parents, and keep their order.
    parents, depths, ranks: (N,) int32; the root has parent -1, depth 0 and rank 0. leaves: (L,) int32.
    Raises UsageError for a gap, a duplicate, a negative rank or more than 256 leaves.
    """

    def __init__(self, paths: Iterable[Sequence[int]], *, in_order: bool = False) -> None:
        listed = [tuple(int(r) for r in p) for p in paths]
        nodes = listed if in_order else [(), *sorted(set(listed) - {()}, key=lambda p: (len(p), p))]
        if len(nodes) != len(listed) + (() not in listed):
            twice = next(p for p in listed if listed.count(p) > 1)
            raise UsageError(f"tree: the path {list(twice)} is given twice")
        index: dict[RankPath, int] = {p: i for i, p in enumerate(nodes)}
        for p in nodes[1:]:
            if min(p) < 0:
                raise UsageError(f"tree: the path {list(p)} has a negative rank")
            if p[:-1] not in index:
                raise UsageError(f"tree: the path {list(p)} has no parent {list(p[:-1])}")
        self.paths: tuple[RankPath, ...] = tuple(nodes)
        self._flat: dict[int, list[int]] = {}
        self._branches: dict[tuple[int, int], Tree] = {}
        self.parents: Int32Array = np.array([-1] + [index[p[:-1]] for p in nodes[1:]], np.int32)
        self.depths: Int32Array = np.array([len(p) for p in nodes], np.int32)
        self.ranks: Int32Array = np.array([p[-1] if p else 0 for p in nodes], np.int32)
        self.children: list[list[int]] = [[] for _ in nodes]
        for i, parent in enumerate(self.parents.tolist()[1:], 1):
            self.children[parent].append(i)
        self.leaves: Int32Array = np.array([i for i, c in enumerate(self.children) if not c], np.int32)
        if len(self.leaves) > MAX_LEAVES:
            raise UsageError(f"tree: {len(self.leaves)} leaves; llama.cpp has sequences for {MAX_LEAVES}")

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"Tree({[list(p) for p in self.paths[1:]]})"

    @cached_property
    def max_depth(self) -> int:
        """Depth of the deepest node: how many heads the tree uses."""
        return int(self.depths.max())

    @cached_property
    def n_ranks(self) -> int:
        """How many guesses of a head the tree uses at the most."""
        return int(self.ranks.max()) + 1

    @cached_property
    def level_sizes(self) -> list[int]:
        """How many nodes there are at depth 1, 2, …"""
        sizes: list[int] = np.bincount(self.depths)[1:].tolist()
        return sizes

    @cached_property
    def depth_list(self) -> list[int]:
        """`depths` as a list."""
        depths: list[int] = self.depths.tolist()
        return depths

    @cached_property
    def leaf_depths(self) -> list[int]:
        """The depth of each leaf."""
        return [self.depth_list[leaf] for leaf in self.leaves.tolist()]

    def fill(self, guesses: Int32Array) -> list[int]:
        """Return the tokens of the nodes 1 … N-1 from a table (K, R) of guesses, the same for all nodes of a depth.

        A list: between two decodes all caches are cold, and numpy's small operations cost 5 to 15 µs each.
        """
        ranks, flat = guesses.shape[1], guesses.ravel().tolist()
        if ranks not in self._flat:
            self._flat[ranks] = ((self.depths[1:] - 1) * ranks + self.ranks[1:]).tolist()
        return [flat[at] for at in self._flat[ranks]]

    def child_with(self, node: int, token: int, tokens: list[int]) -> int:
        """Return the child of a node that holds a token, given all nodes' tokens (N,); 0: there is none."""
        for child in self.children[node]:
            if tokens[child] == token:
                return child
        return 0

    def with_branch(self, node: int, length: int) -> Tree:
        """Return the tree with a chain of so many more nodes under a node; they stand behind all others."""
        if not length:
            return self
        if (node, length) not in self._branches:
            rank = 1 + max((self.paths[child][-1] for child in self.children[node]), default=-1)
            branch = [(*self.paths[node], rank, *(0,) * more) for more in range(length)]
            self._branches[node, length] = Tree([*self.paths, *branch], in_order=True)
        return self._branches[node, length]

    def path_to(self, node: int) -> list[int]:
        """Return the nodes from the root to a node, both included."""
        path = [node]
        while node:
            node = int(self.parents[node])
            path.insert(0, node)
        return path

    @cached_property
    def under(self) -> npt.NDArray[np.bool_]:
        """(N, L): whether leaf l hangs under (or is) node n."""
        table = np.zeros((len(self), len(self.leaves)), np.bool_)
        for lane, leaf in enumerate(self.leaves.tolist()):
            table[self.path_to(leaf), lane] = True
        return table

    @cached_property
    def shared_depths(self) -> list[list[int]]:
        """For each node, for each leaf: the depth down to which their paths are the same."""
        out = np.zeros((len(self), len(self.leaves)), np.int32)
        for node in range(1, len(self)):
            out[node] = np.where(self.under[node], self.depths[node], out[self.parents[node]])
        table: list[list[int]] = out.tolist()
        return table

    @classmethod
    def chain(cls, length: int) -> Tree:
        """The best guess of each of the first `length` heads."""
        return cls([(0,) * d for d in range(1, length + 1)])

    @classmethod
    def product(cls, widths: Sequence[int]) -> Tree:
        """Every combination of the best `widths[i]` guesses of head i + 1."""
        paths: list[RankPath] = []
        level: list[RankPath] = [()]
        for width in widths:
            level = [(*p, r) for p in level for r in range(width)]
            paths += level
        return cls(paths)

    @classmethod
    def parse(cls, text: str) -> Tree:
        """Read `4` (a chain), `2,2,1` (widths per depth) or the path of a JSON file with rank paths."""
        parts = text.split(",")
        if all(p.strip().isascii() and p.strip().isdigit() for p in parts):
            numbers = [int(p) for p in parts]
            if len(numbers) == 1 and numbers[0] <= MAX_LEAVES:
                return cls.chain(numbers[0])
            if len(numbers) == 1 or 0 in numbers or np.prod(numbers, dtype=float) > MAX_LEAVES:
                raise UsageError(f"tree {text!r}: widths from 1 on, {MAX_LEAVES} leaves and levels at most")
            return cls.product(numbers)
        path = Path(text)
        if not path.is_file():
            raise UsageError(f"tree {text!r}: neither a length (4), widths (2,2,1) nor a JSON file of rank paths")
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            if not all(type(r) is int for p in listed for r in p):
                raise TypeError("ranks are whole numbers")
            return cls(tuple(p) for p in listed)
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(
                f"tree file {text}: not a list of rank paths such as [[0], [0, 0], [1]] ({error})"
            ) from None
