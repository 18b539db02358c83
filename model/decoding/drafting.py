"""What a drafter is: states and trees in, their nodes' tokens out. Knows neither torch nor llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from model.trees.tree import Tree


class Drafter(Protocol):
    """Guesses the tokens behind the next one from a final hidden state."""

    def draft(self, hidden: npt.NDArray[np.float32], roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        """Fill trees: return for each the tokens of its nodes 1 … N-1.

        hidden: (B, D), the states that the roots were decided from; roots: B tokens; trees: B, with a draft each.
        """
        ...


class Ranker(Drafter, Protocol):
    """A drafter that also shows its ranked guesses, to be counted."""

    def rank(
        self, hidden: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        """Return guesses for states (B, D): tokens (B, K, R), best first, and their probabilities or None.

        tokens: (B, K), the text behind each state, the root first; head k may look at the first k of them.
        """
        ...


class RandomDrafter:
    """Guesses at random: the worst case that speed is held against, and a case for the proofs."""

    def __init__(self, n_vocab: int, seed: int = 0) -> None:
        self._rng, self._n_vocab = np.random.default_rng(seed), n_vocab

    def draft(self, hidden: npt.NDArray[np.float32], roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        """See Drafter."""
        return [self._rng.integers(0, self._n_vocab, len(tree) - 1).tolist() for tree in trees]


class ConstantDrafter:
    """Guesses one and the same token: given one that the text never holds, every draft is wrong."""

    def __init__(self, token: int) -> None:
        self._token = token

    def draft(self, hidden: npt.NDArray[np.float32], roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        """See Drafter."""
        return [[self._token] * (len(tree) - 1) for tree in trees]
