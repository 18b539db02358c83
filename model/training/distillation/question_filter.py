"""Which questions are kept: no duplicates, nothing cut off, nothing that only repeats.

Knows neither models nor files.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

SHORTEST = 8  # characters of a question
SHINGLE = 3  # words
NEAR = 0.5  # of a question's shingles stand in one other question: a near duplicate
ECHO = 0.5  # of them stand in the system prompt: it was read aloud
LATIN = 0.8  # of the letters of a text in English, at the least
REPEATED = 0.3  # of its shingles, at the most: more is a loop that was not yet one
_WORD = re.compile(r"\w")


class QuestionFilter:
    """Judges questions in their order, and remembers those that it kept."""

    def __init__(self, language: str) -> None:
        self._english = language.casefold() == "english"
        self._seen: set[str] = set()
        self._with_shingle: defaultdict[str, list[int]] = defaultdict(list)

    def objection(self, text: str, finish_reason: str, system: str) -> str:
        """Return why a question is dropped; nothing where it is kept.

        finish_reason: of its generation. system: the system prompt that it was written behind.
        """
        if finish_reason != "stop":
            return "loops" if finish_reason == "loop" else "without an end"
        if len(text) < SHORTEST or not _WORD.search(text):
            return "too short"
        if self._english and _latin(text) < LATIN:
            return "in another language"
        words = _words(text)
        shingles = _shingles(words)
        distinct = set(shingles)
        if 1 - len(distinct) / len(shingles) > REPEATED:
            return "loops"
        if len(distinct & set(_shingles(_words(system)))) > ECHO * len(distinct):
            return "the system prompt read aloud"
        key = " ".join(words)
        if key in self._seen:
            return "exact duplicates"
        shared = Counter(i for shingle in distinct for i in self._with_shingle[shingle])
        if shared and max(shared.values()) > NEAR * len(distinct):
            return "near duplicates"
        for shingle in distinct:
            self._with_shingle[shingle].append(len(self._seen))
        self._seen.add(key)
        return ""


def _words(text: str) -> list[str]:
    """Return words in small letters; characters, where a script puts no spaces between words."""
    return re.findall(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+", text.casefold())


def _shingles(words: list[str]) -> list[str]:
    """Return all runs of SHINGLE words; of a shorter text the text."""
    n = max(1, len(words) - SHINGLE + 1)
    return [" ".join(words[i : i + SHINGLE]) for i in range(n)]


def _latin(text: str) -> float:
    """Return the share of Latin ones among the letters; 1 where there are none."""
    letters = [c for c in text if c.isalpha()]
    return sum(c < "ɐ" for c in letters) / len(letters) if letters else 1.0
