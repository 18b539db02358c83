"""The detokenizer: tokens in, text out that is certain.

It never gives half a character, nor anything that may turn out to begin a stop string. Each token's
bytes are decoded once. Knows no model: a function gives the bytes of a token.
"""

from __future__ import annotations

import codecs
import collections.abc as abc

from model.errors import UsageError


class Detokenizer:
    """The text of one sequence as it grows. stopped: a stop string has been completed.

    piece(token): the token's bytes. stop: strings that end the text; they and what follows are cut
    off.
    """

    def __init__(self, piece: abc.Callable[[int], bytes], stop: abc.Sequence[str] = ()) -> None:
        if "" in stop:
            raise UsageError("a stop string is empty")
        self._piece = piece
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._texts = list[str]()  # of the tokens that `take` has not given yet
        self._held = ""  # decoded, but not given; with stop strings only
        self._n_certain = 0  # characters at the beginning of _held that no stop string can claim
        self._given = 0  # characters of the first of _texts that have been given already
        self.stopped = False

    def add(self, token: int) -> bool:
        """Take the next token; say whether it completes a stop string."""
        text = self._decoder.decode(self._piece(token))
        self._texts.append(text)
        if not self._stop:
            return False
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self._n_certain = len(self._held)
            self.stopped = True
            return True
        self._n_certain = len(self._held) - self._may_begin_a_stop()
        return False

    def _may_begin_a_stop(self) -> int:
        """Return how many of the last characters are the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(longest + 1, len(stop)):
                if self._held.endswith(stop[:length]):
                    longest = length
        return longest

    def take(self, *, last: bool = False) -> tuple[str, list[str]]:
        """Return the text that has become certain since the last call, and its tokens' texts.

        last: nothing follows. Then held-back text is certain, half a character becomes a
        replacement character, and the token before a stop string may lose its end.
        """
        ends_here = last and not self.stopped
        rest = self._decoder.decode(b"", True) if ends_here else ""
        if not self._stop:
            texts = self._texts
            self._texts = []
            return "".join(texts) + rest, texts
        if ends_here:
            self._held += rest
            self._n_certain = len(self._held)
        certain = self._held[: self._n_certain]
        self._held = self._held[self._n_certain :]
        self._n_certain = 0
        return certain, self._take_tokens(len(certain), last)

    def _take_tokens(self, n_characters: int, last: bool) -> list[str]:
        """Return the texts of the tokens that end within the next so many characters of text."""
        taken = list[str]()
        while self._texts and len(self._texts[0]) - self._given <= n_characters:
            text = self._texts.pop(0)
            n_characters -= len(text) - self._given
            self._given = 0
            taken.append(text)
        self._given += n_characters
        if last and self._texts and self._given:  # cut by a stop string
            taken.append(self._texts[0][: self._given])
        return taken
