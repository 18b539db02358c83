"""N-gram drafts: what followed the last tokens where they stood before.

Knows no model and no tree.
"""

from __future__ import annotations

import collections.abc as abc
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.decoding.drafters.drafter import NGRAM, Guesses

SHORTEST = 2  # tokens that must agree for a match
LONGEST = 32  # agreeing tokens beyond these are not counted
MAX_MATCHES = 8  # earlier occurrences that are compared, the latest first
MAX_GUESSES = 3  # different tokens that followed

# A guess is of a kind by the bits of the number of tokens that agree before it (2: two or three, …
# 6: 32 and more), and by whether it is the best one. How often each is accepted, before anything is
# known:
_BEST = (0.0, 0.0, 0.4, 0.55, 0.7, 0.85, 0.95)
_FURTHER = (0.0, 0.0, 0.08, 0.06, 0.05, 0.03, 0.02)
PRIORS = (*_BEST, *_FURTHER)


class _Match(NamedTuple):
    """A place where the sequence's last tokens stood before.

    at: of the token that followed; agree: how many tokens before it are the same; period: how far
    back from the end it is.
    """

    at: int
    agree: int
    period: int


class NgramDrafter:
    """A `ContinuationDrafter` over the tokens of one sequence, which may grow but must not change.

    Each token is indexed once (a dictionary entry and a link to the occurrence before), and each
    start looks at no more than MAX_MATCHES of them, LONGEST tokens back: constant time per token,
    whatever the length of the sequence. Prompt lookup decoding
    (https://github.com/apoorvumang/prompt-lookup-decoding), with the longest match preferred, of
    equal ones the latest. A cursor holds the matches that still agree, the longest first.
    """

    name = NGRAM
    learns = False

    def __init__(self, tokens: abc.Sequence[int]) -> None:
        self._tokens = tokens
        # the last SHORTEST tokens → where their latest copy ends
        self._latest: dict[tuple[int, ...], int] = {}
        # for each position, where the copy before it ends; -1: there is none
        self._before: list[int] = []

    def start(self) -> list[_Match] | None:
        """See ContinuationDrafter."""
        tokens = self._tokens
        end = len(tokens)

        # Index the tokens that are new.
        for i in range(len(self._before), end):
            gram = tuple(tokens[i - SHORTEST + 1 : i + 1]) if i >= SHORTEST - 1 else ()
            self._before.append(self._latest.get(gram, -1) if gram else -1)
            if gram:
                self._latest[gram] = i

        # Follow the links back, and see how far each match goes.
        at = self._before[-1] if end else -1
        if at < 0:
            return None
        matches = list[_Match]()
        for _ in range(MAX_MATCHES):
            agree = SHORTEST
            limit = min(LONGEST, at + 1)
            while agree < limit and tokens[at - agree] == tokens[end - 1 - agree]:
                agree += 1
            matches.append(_Match(at + 1, agree, end - 1 - at))
            at = self._before[at]
            if agree == LONGEST or at < 0:
                break
        matches.sort(key=_by_length)
        return matches

    def advance(self, cursor: list[_Match], token: int) -> list[_Match] | None:
        """See ContinuationDrafter.

        A match that runs into the end of the sequence goes round: one that repeats itself is
        continued for as long as is asked.
        """
        further = list[_Match]()
        for match in cursor:
            if self._tokens[match.at] != token:
                continue
            at = match.at + 1
            if at == len(self._tokens):
                at -= match.period
            further.append(_Match(at, min(match.agree + 1, LONGEST), match.period))
        return further or None

    def guesses(self, cursor: list[_Match]) -> Guesses:
        """See ContinuationDrafter."""
        best = cursor[0]
        found = [(self._tokens[best.at], best.agree.bit_length())]
        if len(cursor) == 1:
            return found
        tokens = {found[0][0]}
        for match in cursor:
            token = self._tokens[match.at]
            if token not in tokens:
                tokens.add(token)
                found.append((token, len(_BEST) + match.agree.bit_length()))
                if len(found) == MAX_GUESSES:
                    break
        return found

    def observe(
        self,
        tokens: abc.Sequence[int],
        rows: abc.Sequence[int],
        logits: npt.NDArray[np.float32],
    ) -> None:
        """Learn nothing: the sequence's tokens say it all."""


def _by_length(match: _Match) -> int:
    return -match.agree
