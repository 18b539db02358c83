"""What a drafter is: states in, ranked tokens out. Knows neither torch nor llama.cpp nor trees."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Drafter(Protocol):
    """Guesses the tokens behind the next one from a final hidden state."""

    def draft(self, hidden: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        """Return guesses for states (B, D): tokens (B, K, R), best first, and their probabilities or None."""
        ...


class RandomDrafter:
    """Guesses at random: the worst case that speed is held against, and a case for the proofs."""

    def __init__(self, n_vocab: int, heads: int, ranks: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._n_vocab, self._shape = n_vocab, (heads, ranks)

    def draft(self, hidden: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], None]:
        """See Drafter."""
        return self._rng.integers(0, self._n_vocab, (len(hidden), *self._shape), dtype=np.int32), None


class ConstantDrafter:
    """Guesses one and the same token: given one that the text never holds, every draft is wrong."""

    def __init__(self, token: int, heads: int, ranks: int) -> None:
        self._tokens = np.full((1, heads, ranks), token, np.int32)

    def draft(self, hidden: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], None]:
        """See Drafter."""
        return np.repeat(self._tokens, len(hidden), 0), None
