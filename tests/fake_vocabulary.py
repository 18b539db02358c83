"""A vocabulary of bytes, where ids can be read as text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

EOS = 2


class Bytes:
    """1 begins a text, 2 ends one. space: SentencePiece's, before each text and behind each mark."""

    bos, eog = 1, frozenset({EOS})

    def __init__(self, space: bool = False) -> None:
        self.space = space

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> npt.NDArray[np.int32]:
        pieces = text.encode().split(b"</s>") if parse_special else [text.encode()]
        data = b"\x02".join((b" " if self.space and piece else b"") + piece for piece in pieces)
        return np.array([*([self.bos] if add_bos else []), *data], np.int32)

    def piece(self, token: int) -> bytes:
        return b"" if token < 3 else bytes([token])

    def detokenize(self, tokens: list[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode()
