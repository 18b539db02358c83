"""Drafts from the text so far: what followed the last tokens where they stood before. Knows no model and no tree."""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 2  # tokens that must agree for a match
LONGEST = 32  # agreeing tokens beyond these are not counted
PLACES = 8  # earlier places that are compared, the latest first


class NgramIndex:
    """An index over one text, which may grow between calls but must not change otherwise.

    Each token is indexed once (a dictionary entry and a link to the place before), and each proposal looks at no more
    than PLACES places, LONGEST tokens back: constant time per token, whatever the length of the text.
    Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding), with the longest match preferred.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._latest: dict[tuple[int, ...], int] = {}  # the last SHORTEST tokens → where their latest copy ends
        self._before: list[int] = []  # for each place, where the copy before it ends; -1: there is none

    def propose(self, most: int) -> tuple[list[int], int]:
        """Return up to `most` tokens that may follow, and how many tokens before them agree (0: no match).

        Of several places the longest match counts, of equal ones the latest. A match that runs into the end of the
        text goes round: a text that repeats itself is continued for as long as is asked.
        """
        tokens, end = self._tokens, len(self._tokens)
        for i in range(len(self._before), end):
            gram = tuple(tokens[i - SHORTEST + 1 : i + 1]) if i >= SHORTEST - 1 else ()
            self._before.append(self._latest.get(gram, -1) if gram else -1)
            if gram:
                self._latest[gram] = i
        best, place, at = 0, -1, self._before[-1] if end else -1
        for _ in range(PLACES):
            if at < 0:
                break
            agree, limit = SHORTEST, min(LONGEST, at + 1)
            while agree < limit and tokens[at - agree] == tokens[end - 1 - agree]:
                agree += 1
            if agree > best:
                best, place = agree, at
                if agree == LONGEST:
                    break
            at = self._before[at]
        if place < 0 or most < 1:
            return [], 0
        following = list(tokens[place + 1 : place + 1 + most])
        period = end - 1 - place
        while len(following) < most:
            following.append(following[-period])
        return following, best
