"""Recycled continuations: what the base model found likely behind the same tokens before.

Each verified row shows what may follow its token; that is kept under the last two tokens and under
the last one, for all sequences of a process (Token Recycling, arXiv 2408.08696). Knows no tree and
no llama.cpp.
"""

from __future__ import annotations

import collections.abc as abc
from collections import OrderedDict
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model.decoding.drafters.drafter import (
    BIN_PRIORS,
    RECYCLED,
    Guesses,
    ranked_bins,
)
from model.trees.likeliest import likeliest

# Bytes of an entry under two tokens and one under one token, of four guesses each (tracemalloc,
# CPython 3.11).
ENTRY_BYTES = 900
_PAIR = 1 << 32  # tokens are below

# What was likely behind two tokens is of other kinds than what was behind one. Seen on answers of
# SmolLM2-135M at temperatures 0 and 0.7, where no other source had a guess: 0.5 to 0.7 of what the
# model had said then, and 0.3 to 0.4.
PRIORS = tuple(0.65 * p for p in BIN_PRIORS) + tuple(0.4 * p for p in BIN_PRIORS)
_LATER = len(BIN_PRIORS)


class ContinuationMemory:
    """What was likely behind tokens, for sequences that share it.

    megabytes: how large it may become; then what was learnt longest ago goes.
    """

    def __init__(self, megabytes: float) -> None:
        self._most = max(1, int(megabytes * 2**20 / ENTRY_BYTES))
        # The longest unused first.
        self._behind_two = OrderedDict[int, Guesses]()
        self._behind_one = OrderedDict[int, Guesses]()

    def __len__(self) -> int:
        return len(self._behind_two)

    def clear(self) -> None:
        """Forget everything."""
        self._behind_two.clear()
        self._behind_one.clear()

    def find(self, before: int, last: int) -> Guesses:
        """Return what may follow these two tokens; nothing where neither was seen."""
        found = self._behind_two.get(before * _PAIR + last)
        if found is None:
            found = self._behind_one.get(last, ())
        return found

    def keep(self, before: int, last: int, logits: npt.NDArray[np.float32]) -> None:
        """Remember the likeliest tokens of logits (V,) behind two tokens; before: -1 for none."""
        tokens, probabilities = likeliest(logits)
        kinds = ranked_bins(probabilities)
        if before >= 0:
            self._put(self._behind_two, before * _PAIR + last, tokens, kinds)
        self._put(self._behind_one, last, tokens, [_LATER + kind for kind in kinds])

    def _put(
        self, entries: OrderedDict[int, Guesses], key: int, tokens: list[int], kinds: list[int]
    ) -> None:
        entries[key] = tuple(zip(tokens, kinds, strict=True))
        entries.move_to_end(key)
        if len(entries) > self._most:
            entries.popitem(last=False)


class RecycledDrafter:
    """A `ContinuationDrafter` over the tokens of one sequence and a memory.

    A cursor is the last two tokens.
    """

    name = RECYCLED
    learns = True

    def __init__(self, tokens: abc.Sequence[int], memory: ContinuationMemory) -> None:
        self._tokens = tokens
        self._memory = memory

    def start(self) -> tuple[int, int] | None:
        """See ContinuationDrafter."""
        if len(self._tokens) < 2:
            return None
        return self._tokens[-2], self._tokens[-1]

    def advance(self, cursor: tuple[int, int], token: int) -> tuple[int, int]:
        """See ContinuationDrafter."""
        return cursor[1], token

    def guesses(self, cursor: tuple[int, int]) -> Guesses:
        """See ContinuationDrafter."""
        return self._memory.find(*cursor)

    def observe(
        self,
        tokens: abc.Sequence[int],
        rows: abc.Sequence[int],
        logits: npt.NDArray[np.float32],
    ) -> None:
        """See ContinuationDrafter."""
        for (before, last), row in zip(pairwise(tokens), rows, strict=True):
            self._memory.keep(before, last, logits[row])
