"""N-gram drafts: what followed the last tokens where they stood before.

Knows no model and no tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.decoding.drafters.drafter import NGRAM

SHORTEST = 2  # tokens that must agree for a match
LONGEST = 32  # agreeing tokens beyond these are not counted
MAX_MATCHES = 8  # earlier occurrences that are compared, the latest first


class NgramDrafter:
    """A `ContinuationDrafter` over the tokens of one sequence, which may grow but must not change.

    Each token is indexed once (a dictionary entry and a link to the occurrence before), and each
    proposal looks at no more than MAX_MATCHES of them, LONGEST tokens back: constant time per
    token, whatever the length of the sequence. Prompt lookup decoding
    (https://github.com/apoorvumang/prompt-lookup-decoding), with the longest match preferred.
    """

    name = NGRAM

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        # the last SHORTEST tokens → where their latest copy ends
        self._latest: dict[tuple[int, ...], int] = {}
        # for each position, where the copy before it ends; -1: there is none
        self._before: list[int] = []

    def propose(self, most: int) -> tuple[list[int], int]:
        """Return up to `most` tokens that may follow, and how many before them agree; 0: none.

        The longest match counts, of equal ones the latest. A match that runs into the end of the
        sequence goes round: one that repeats itself is continued for as long as is asked.
        """
        tokens = self._tokens
        end = len(tokens)

        # Index the tokens that are new.
        for i in range(len(self._before), end):
            gram = tuple(tokens[i - SHORTEST + 1 : i + 1]) if i >= SHORTEST - 1 else ()
            self._before.append(self._latest.get(gram, -1) if gram else -1)
            if gram:
                self._latest[gram] = i

        # Follow the links back, and find the longest match.
        best = 0
        match_end = -1
        at = self._before[-1] if end else -1
        for _ in range(MAX_MATCHES):
            if at < 0:
                break
            agree = SHORTEST
            limit = min(LONGEST, at + 1)
            while agree < limit and tokens[at - agree] == tokens[end - 1 - agree]:
                agree += 1
            if agree > best:
                best = agree
                match_end = at
                if agree == LONGEST:
                    break
            at = self._before[at]
        if match_end < 0 or most < 1:
            return [], 0

        # What followed it; beyond the end of the sequence, what this repeats.
        continuation = list(tokens[match_end + 1 : match_end + 1 + most])
        period = end - 1 - match_end
        while len(continuation) < most:
            continuation.append(continuation[-period])
        return continuation, best
