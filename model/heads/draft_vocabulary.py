"""Draft vocabulary: the tokens that heads are taught and draft from, by a text's token counts.

The LM head over all tokens costs more than all else that heads do. Knows neither heads nor files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Counts = npt.NDArray[np.integer]  # (V,) how often each token stands in a text

COVERAGE = 0.999  # of the text, that a draft vocabulary makes up
MIN_DRAFT_VOCAB = 1024
# What little text has taught heads is used on other text: tokens that it lacks, too. Tokens of low
# ids are the commonest ones of a byte-pair encoding, so they come first among those never seen.
MIN_TAUGHT_VOCAB = 8192
DRAFT_VOCAB_STEP = 64  # rows of an LM head are best a multiple of this


def draft_vocabulary(counts: Counts, asked: int | None) -> Int32Array | None:
    """Return the tokens (R,), ascending, that heads are taught with; None: all of them.

    asked: how many; 0: all; None: as many as make up COVERAGE of the text.
    """
    number = asked
    if number is None:
        number = max(MIN_TAUGHT_VOCAB, covering(counts, COVERAGE))
    if not 0 < number < len(counts):
        return None
    return commonest(counts, number)


def covering(counts: Counts, share: float) -> int:
    """Return how many of the commonest tokens make up `share` of a counted text.

    counts: (V,). The result is a multiple of 64, at least 1,024.
    """
    totals = np.sort(counts.astype(np.int64))[::-1].cumsum()
    needed = int(np.searchsorted(totals, share * totals[-1])) + 1
    steps = -(-needed // DRAFT_VOCAB_STEP)
    return max(MIN_DRAFT_VOCAB, steps * DRAFT_VOCAB_STEP)


def commonest(counts: Counts, n: int) -> Int32Array:
    """Return the n tokens of the largest counts (V,), ascending; of equals, those of lower ids."""
    by_count = np.argsort(-counts.astype(np.int64), kind="stable")
    return np.sort(by_count[:n]).astype(np.int32)
