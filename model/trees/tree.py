"""Draft trees: which node hangs under which, by which guess. Knows no tokens and no probabilities.

A tree is a set of rank paths (upstream Medusa's `medusa_choices`): `(0, 1)` is the best guess of
head 1, then the second best of head 2. The root, the token that the base model has decided but not
cached, is node 0 and the empty path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.errors import UsageError

Int32Array = npt.NDArray[np.int32]
RankPath = tuple[int, ...]
MAX_LEAVES = 256  # one sequence id per leaf, and llama.cpp has 256


class Tree:
    """The topology of one draft: N nodes with the root, in order of depth.

    in_order: the paths begin with the root, come behind their parents, and keep their order.
    parents, depths, ranks: (N,) int32; the root has parent -1, depth 0 and rank 0.
    children: for each node the nodes under it. leaves: (L,) int32.
    Raises UsageError for a gap, a duplicate, a negative rank or more than 256 leaves.
    """

    def __init__(self, paths: Iterable[Sequence[int]], *, in_order: bool = False) -> None:
        listed = [tuple(int(rank) for rank in path) for path in paths]
        if in_order:
            nodes = listed
        else:
            _refuse_duplicates(listed)
            nodes = [(), *sorted(set(listed) - {()}, key=lambda path: (len(path), path))]
        index = {path: node for node, path in enumerate(nodes)}
        for path in nodes[1:]:
            if min(path) < 0:
                raise UsageError(f"tree: the path {list(path)} has a negative rank")
            if path[:-1] not in index:
                raise UsageError(f"tree: the path {list(path)} has no parent {list(path[:-1])}")
        self.paths: tuple[RankPath, ...] = tuple(nodes)
        parents = [-1, *(index[path[:-1]] for path in nodes[1:])]
        self.parents: Int32Array = np.array(parents, np.int32)
        self.depths: Int32Array = np.array([len(path) for path in nodes], np.int32)
        self.ranks: Int32Array = np.array([0, *(path[-1] for path in nodes[1:])], np.int32)
        self.children: list[list[int]] = [[] for _ in nodes]
        for child, parent in enumerate(parents[1:], 1):
            self.children[parent].append(child)
        leaves = [node for node, children in enumerate(self.children) if not children]
        self.leaves: Int32Array = np.array(leaves, np.int32)
        if len(leaves) > MAX_LEAVES:
            raise UsageError(
                f"tree: {len(leaves)} leaves; llama.cpp has sequences for {MAX_LEAVES}"
            )
        self._guess_positions: dict[int, list[int]] = {}  # by ranks per head, see `fill`
        self._known_paths: dict[int, tuple[int, ...]] = {}  # see `path_to`
        self._extended: dict[tuple[int, int], Tree] = {}  # by node and length, see `with_chain`

    @classmethod
    @lru_cache(maxsize=4096)
    def from_parents(cls, parents: tuple[int, ...]) -> Tree:
        """Return the tree whose node i + 1 hangs under node parents[i], which stands before it.

        Kept, as trees that grow step by step are of few shapes.
        """
        paths: list[RankPath] = [()]
        n_children = [0] * (len(parents) + 1)
        for parent in parents:
            paths.append((*paths[parent], n_children[parent]))
            n_children[parent] += 1
        return cls(paths, in_order=True)

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"Tree({[list(path) for path in self.paths[1:]]})"

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

    def fill(self, guesses: Int32Array) -> list[int]:
        """Return the tokens of the nodes 1 … N-1 from guesses that are the same for a whole depth.

        guesses: (K, R) tokens. The result is a list: between two decodes all caches are cold, and
        numpy's small operations cost 5 to 15 µs each.
        """
        ranks = guesses.shape[1]
        if ranks not in self._guess_positions:
            positions = (self.depths[1:] - 1) * ranks + self.ranks[1:]
            self._guess_positions[ranks] = positions.tolist()
        flat = guesses.ravel().tolist()
        return [flat[position] for position in self._guess_positions[ranks]]

    def child_with(self, node: int, token: int, tokens: list[int]) -> int:
        """Return the child of a node that holds a token; 0: there is none.

        tokens: (N,), those of all nodes.
        """
        for child in self.children[node]:
            if tokens[child] == token:
                return child
        return 0

    def with_chain(self, node: int, length: int) -> Tree:
        """Return the tree with a chain of `length` more nodes under a node, behind all others."""
        if not length:
            return self
        key = (node, length)
        if key not in self._extended:
            taken = [self.paths[child][-1] for child in self.children[node]]
            rank = max(taken, default=-1) + 1
            chain = [(*self.paths[node], rank, *(0,) * below) for below in range(length)]
            self._extended[key] = Tree([*self.paths, *chain], in_order=True)
        return self._extended[key]

    def path_to(self, node: int) -> tuple[int, ...]:
        """Return the nodes from the root to a node, both included."""
        path = self._known_paths.get(node)
        if path is None:
            path = (node,)
            while path[0]:
                path = (int(self.parents[path[0]]), *path)
            self._known_paths[node] = path
        return path

    @classmethod
    def chain(cls, length: int) -> Tree:
        """Make a chain: the best guess of each of the first `length` heads."""
        return cls([(0,) * depth for depth in range(1, length + 1)])

    @classmethod
    def product(cls, widths: Sequence[int]) -> Tree:
        """Make a tree of every combination of the best `widths[i]` guesses of head i + 1."""
        paths: list[RankPath] = []
        level: list[RankPath] = [()]
        for width in widths:
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls(paths)

    @classmethod
    def parse(cls, text: str) -> Tree:
        """Read `4` (a chain), `2,2,1` (widths per depth) or the path of a JSON file of rank paths.

        Raises UsageError for anything else, and for what `Tree` refuses.
        """
        parts = text.split(",")
        if all(part.strip().isascii() and part.strip().isdigit() for part in parts):
            return cls._from_numbers(text, [int(part) for part in parts])
        if not Path(text).is_file():
            raise UsageError(
                f"tree {text!r}: neither a length (4), widths (2,2,1) nor a JSON file of rank paths"
            )
        return cls._from_file(text)

    @classmethod
    def _from_numbers(cls, text: str, numbers: list[int]) -> Tree:
        if len(numbers) == 1 and numbers[0] <= MAX_LEAVES:
            return cls.chain(numbers[0])
        leaves = np.prod(numbers, dtype=float)
        if len(numbers) == 1 or 0 in numbers or leaves > MAX_LEAVES:
            raise UsageError(
                f"tree {text!r}: widths from 1 on, {MAX_LEAVES} leaves and levels at most"
            )
        return cls.product(numbers)

    @classmethod
    def _from_file(cls, path: str) -> Tree:
        try:
            listed = json.loads(Path(path).read_text(encoding="utf-8"))
            if not all(type(rank) is int for ranks in listed for rank in ranks):
                raise TypeError("ranks are whole numbers")
            return cls(tuple(ranks) for ranks in listed)
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(
                f"tree file {path}: not a list of rank paths such as [[0], [0, 0], [1]] ({error})"
            ) from None


def _refuse_duplicates(paths: list[RankPath]) -> None:
    seen = set[RankPath]()
    for path in paths:
        if path in seen:
            raise UsageError(f"tree: the path {list(path)} is given twice")
        seen.add(path)
