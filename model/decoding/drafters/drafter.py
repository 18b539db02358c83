"""What a drafter is: it guesses the tokens that may follow. Knows neither torch nor llama.cpp.

There are two kinds. A tree drafter (draft heads) guesses from final hidden states, for many
sequences in one call. A continuation drafter belongs to one sequence and goes on with tokens alone
(n-grams, recycled continuations), in no time to speak of.
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from model.trees.tree import Tree

HEADS, NGRAM, RECYCLED = "heads", "ngram", "recycled"  # the names of the draft sources

# Tokens that may follow, best first, and with each its kind: guesses of one kind are equally good,
# and how good that is shows as they are verified.
Guesses = abc.Sequence[tuple[int, int]]
BINS = 10  # of a probability, as a part of a kind


def probability_bin(probability: float) -> int:
    """Return the bin 0 … BINS - 1 of a probability."""
    return min(BINS - 1, int(BINS * probability))


def ranked_bins(probabilities: abc.Sequence[float]) -> list[int]:
    """Return the kinds of guesses by their probabilities, the best guess first.

    Those behind the best are kinds of their own: a greedy model chooses them more rarely than their
    probability says.
    """
    kinds = [probability_bin(p) for p in probabilities]
    return [kinds[0], *(BINS + kind for kind in kinds[1:])] if kinds else []


# How often each of those kinds is accepted, before anything is known.
BIN_PRIORS = tuple((i + 0.5) / BINS for i in range(BINS)) * 2


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


class LevelDrafter(Drafter, Protocol):
    """A tree drafter that is asked level by level, where that is worth its time."""

    def look(
        self,
        hidden: npt.NDArray[np.float32],
        states: abc.Sequence[int],
        paths: abc.Sequence[abc.Sequence[int]],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return tokens that may follow each path, best first, and their probabilities.

        hidden: (B, D), the states that the roots were decided from. states: for each path the row
        of `hidden`. paths: tokens from the root on, of one length d, for the d-th level.
        """
        ...


class RankingDrafter(TreeDrafter, LevelDrafter, Protocol):
    """A tree drafter that also shows its ranked guesses, to be counted."""

    def rank(
        self, hidden: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        """Return guesses (B, K, R) for states (B, D), best first, and their probabilities or None.

        tokens: (B, K), those behind each state, the root first; head k may look at the first k.
        """
        ...


class ContinuationDrafter(Drafter, Protocol):
    """Guesses what follows the tokens of one sequence, to which it was bound when it was made.

    A cursor is a place in what it knows; the drafter alone knows what is in it. learns: it learns
    from what is verified, which takes some time.
    """

    @property
    def learns(self) -> bool: ...  # noqa: D102

    def start(self) -> Any:
        """Return the cursor behind the sequence's last token; None: it knows nothing there."""
        ...

    def advance(self, cursor: Any, token: int) -> Any:
        """Return the cursor behind one token more, or None. It must not change `cursor`."""
        ...

    def guesses(self, cursor: Any) -> Guesses:
        """Return the tokens that may come next, best first."""
        ...

    def observe(
        self,
        tokens: abc.Sequence[int],
        rows: abc.Sequence[int],
        logits: npt.NDArray[np.float32],
    ) -> None:
        """Learn from the accepted nodes of a draft tree.

        tokens: (n + 1,), the one before the root (-1: there is none), and theirs. rows: (n,), which
        of `logits` is theirs. logits: (N, V), what the base model says behind each node; not to be
        kept.
        """
        ...


def likeliest_chain(drafter: ContinuationDrafter, most: int) -> list[int]:
    """Return up to `most` tokens that a drafter expects, the best guess behind each."""
    chain = list[int]()
    cursor = drafter.start() if most > 0 else None
    while cursor is not None and len(chain) < most:
        guesses = drafter.guesses(cursor)
        if not guesses:
            break
        chain.append(guesses[0][0])
        cursor = drafter.advance(cursor, chain[-1])
    return chain


@dataclass(frozen=True)
class Drafters:
    """What may draft for the sequences of a decoder, by the name of the draft source.

    trees: serve all sequences. continuations: make the drafter of one sequence from its tokens.
    forget: has what sequences taught each other forgotten, so that a text which is generated once
    more is drafted as if it were new.
    """

    trees: abc.Mapping[str, TreeDrafter] = field(default_factory=dict)
    continuations: abc.Mapping[str, abc.Callable[[list[int]], ContinuationDrafter]] = field(
        default_factory=dict
    )
    forget: abc.Callable[[], None] = lambda: None


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

    def look(
        self,
        hidden: npt.NDArray[np.float32],
        states: abc.Sequence[int],
        paths: abc.Sequence[abc.Sequence[int]],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See LevelDrafter. It is as sure as it is wrong."""
        tokens = self._rng.integers(0, self._n_vocab, (len(paths), 2)).tolist()
        return tokens, self._rng.dirichlet((1.0, 0.1), len(paths)).tolist()


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
