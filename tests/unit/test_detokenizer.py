"""Tokens to text: whole characters, stop strings, and the text of each token."""

from __future__ import annotations

import pytest

from model.decoding.detokenizer import Detokenizer
from model.errors import UsageError


class Pieces:
    """Tokens are numbers of pieces of bytes."""

    def __init__(self, *pieces: bytes, stop: tuple[str, ...] = ()) -> None:
        self.detokenizer = Detokenizer(lambda token: pieces[token], stop)
        self._next = 0

    def add(self) -> bool:
        self._next += 1
        return self.detokenizer.add(self._next - 1)

    def take(self, *, last: bool = False) -> tuple[str, list[str]]:
        return self.detokenizer.take(last=last)


def test_a_character_is_never_split() -> None:
    text = Pieces(b"\xc3", b"\xa9!", b"\xe2\x82")
    assert not text.add() and text.take() == ("", [""]), "the first byte has no text of its own"
    text.add()
    assert text.take() == ("é!", ["é!"])
    text.add()
    assert text.take() == ("", [""]) and text.take(last=True) == ("\ufffd", [])


def test_what_may_become_a_stop_string_is_held_back() -> None:
    text = Pieces(b"abcE", b"N", b"O", stop=("END", "NO"))
    assert not text.add() and text.take() == ("abc", [])
    assert not text.add() and text.take() == ("", [])
    assert text.add() and text.detokenizer.stopped, "NO ends in the E that was held back"
    assert text.take(last=True) == ("E", ["abcE"])


def test_held_back_text_is_released_where_no_stop_string_comes() -> None:
    text = Pieces(b"xEN", b"x", b"..ENDmore", stop=("END",))
    text.add()
    text.add()
    assert text.take() == ("xENx", ["xEN", "x"])
    assert text.add() and text.take(last=True) == ("..", [".."]), (
        "the token before the stop string lost its end"
    )
    text = Pieces(b"xEN", stop=("END",))
    text.add()
    assert text.take(last=True) == ("xEN", ["xEN"])


def test_the_earliest_of_several_stop_strings_counts() -> None:
    text = Pieces(b"one two three", stop=("three", "two"))
    assert text.add() and text.take(last=True) == ("one ", ["one "])


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        Detokenizer(lambda token: b"", ("",))
