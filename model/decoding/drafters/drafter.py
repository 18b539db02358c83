"""What a drafter is: it guesses the tokens that may follow. Knows neither torch nor llama.cpp.

There are two kinds. A tree drafter fills a tree of a given shape from final hidden states (draft
heads), for many sequences in one call. A continuation drafter belongs to one sequence and goes on
with its tokens (n-grams).
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from model.trees.tree import Tree

HEADS, NGRAM = "heads", "ngram"  # the names of the draft sources


class Drafter(Protocol):
    """Any drafter. name: of the draft source, under which its acceptance is counted."""

    @property
    def name(self) -> str: ...  # noqa: D102


class TreeDrafter(Drafter, Protocol):
    """Guesses the tokens behind the next one from a final hidden state."""

    def draft(
        self, hidden: npt.NDArray[np.float32], roots: abc.Sequence[int], trees: abc.Sequence[Tree]
    ) -> list[list[int]]:
        """Fill trees: return for each the tokens of its nodes 1 … N-1.

        hidden: (B, D), the states that the roots were decided from; roots: B tokens; trees: B, with
        a draft each.
        """
        ...


class RankingDrafter(TreeDrafter, Protocol):
    """A tree drafter that also shows its ranked guesses, to be counted."""

    def rank(
        self, hidden: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        """Return guesses (B, K, R) for states (B, D), best first, and their probabilities or None.

        tokens: (B, K), those behind each state, the root first; head k may look at the first k.
        """
        ...


class ContinuationDrafter(Drafter, Protocol):
    """Guesses what follows the tokens of one sequence, to which it was bound when it was made."""

    def propose(self, most: int) -> tuple[list[int], int]:
        """Return up to `most` tokens that may follow, and how many before them agree; 0: none."""
        ...


@dataclass(frozen=True)
class Drafters:
    """What may draft for the sequences of a decoder, by the name of the draft source.

    trees: serve all sequences. continuations: make the drafter of one sequence from its tokens.
    """

    trees: abc.Mapping[str, TreeDrafter] = field(default_factory=dict)
    continuations: abc.Mapping[str, abc.Callable[[list[int]], ContinuationDrafter]] = field(
        default_factory=dict
    )


class RandomDrafter:
    """Guesses at random: the worst case that speed is held against, and a case for the proofs."""

    name = HEADS

    def __init__(self, n_vocab: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._n_vocab = n_vocab

    def draft(
        self, hidden: npt.NDArray[np.float32], roots: abc.Sequence[int], trees: abc.Sequence[Tree]
    ) -> list[list[int]]:
        """See TreeDrafter."""
        return [self._rng.integers(0, self._n_vocab, len(tree) - 1).tolist() for tree in trees]


class ConstantDrafter:
    """Guesses one and the same token.

    Given one that the base model never chooses, every draft is wrong.
    """

    name = HEADS

    def __init__(self, token: int) -> None:
        self._token = token

    def draft(
        self, hidden: npt.NDArray[np.float32], roots: abc.Sequence[int], trees: abc.Sequence[Tree]
    ) -> list[list[int]]:
        """See TreeDrafter."""
        return [[self._token] * (len(tree) - 1) for tree in trees]
