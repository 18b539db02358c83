"""A vocabulary of bytes, where ids can be read as text."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

BOS = 1
EOS = 2
MARKS = {b"<s>": BOS, b"</s>": EOS}
MARK = re.compile(b"(</?s>)")


class Numbers:
    """A vocabulary of n tokens, each the letter of its number."""

    def __init__(self, n_vocab: int = 50, eog: frozenset[int] = frozenset()) -> None:
        self.n_vocab, self.eog = n_vocab, eog

    def piece(self, token: int) -> bytes:
        return bytes([97 + token % 26])


class Bytes:
    """1 (`<s>`) begins a text, 2 (`</s>`) ends one; all others are bytes.

    space: SentencePiece's, before each text and behind each mark.
    """

    bos = BOS
    eog = frozenset({EOS})

    def __init__(self, space: bool = False) -> None:
        self.space = space

    def tokenize(
        self, text: str, *, add_bos: bool = True, parse_special: bool = False
    ) -> npt.NDArray[np.int32]:
        data = text.encode()
        tokens = [BOS] if add_bos else []
        for piece in MARK.split(data) if parse_special else [data]:
            if parse_special and piece in MARKS:
                tokens.append(MARKS[piece])
            elif piece:
                tokens += b" " + piece if self.space else piece
        return np.array(tokens, np.int32)

    def piece(self, token: int) -> bytes:
        return b"" if token < 3 else bytes([token])

    def detokenize(self, tokens: list[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode()
