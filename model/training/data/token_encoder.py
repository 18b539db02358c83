"""Text in, token ids out, part by part: as if the parts of a text stood together.

The tokenizer is the GGUF's own. Knows neither documents nor templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from model.base.chat import Segment

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Tokenizer(Protocol):
    """What is needed of a model to make tokens of a text."""

    bos: int

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> Ids:
        """Return the ids (n,) of a text."""

    def piece(self, token: int) -> bytes:
        """Return the bytes of one token."""


class PartEncoder:
    """Encodes parts of one text. bos: the model's begin mark, (1,); (0,) where it has none.

    Tokenizers that put a space before every text would put a second one before a part that begins
    with a space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        letter = tokenizer.tokenize("a", add_bos=False)
        self._adds_space = False
        if len(letter):
            self._adds_space = tokenizer.piece(int(letter[0])).startswith(b" ")
        first = tokenizer.tokenize("", add_bos=True)[:1]
        self.bos: Ids = first[first == tokenizer.bos]

    def encode(self, text: str, *, special: bool = False, later: bool = False) -> Ids:
        """Return the ids of one part; `later`: another one stands before it."""
        if later and self._adds_space:
            text = text.removeprefix(" ")
        return self._tokenizer.tokenize(text, add_bos=False, parse_special=special)

    def join(self, parts: Sequence[Segment], *, special: bool = False) -> tuple[Ids, Mask]:
        """Return the ids of all parts, and which are answers: (T,) each.

        Without the begin mark that a template may write.
        """
        rows = [
            self.encode(part.text, special=special, later=i > 0) for i, part in enumerate(parts)
        ]
        tokens = np.concatenate([np.empty(0, np.int32), *rows])
        answers = [part.answer for part in parts]
        mask = np.repeat(answers, [len(row) for row in rows]).astype(np.bool_)
        return self.without_bos(tokens, mask)

    def without_bos(self, tokens: Ids, mask: Mask) -> tuple[Ids, Mask]:
        """Take the begin mark away where there is one."""
        if len(self.bos) and len(tokens) and tokens[0] == self.bos[0]:
            return tokens[1:], mask[1:]
        return tokens, mask
