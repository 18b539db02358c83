"""From a prompt to the end of a text, on the fake base model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from fake_base import FakeBase

from model.decoding.generation import Generation, Request, TextStream
from model.decoding.planning import FixedPlan
from model.errors import ContextError, UsageError
from model.trees.tree import Tree


def piece(token: int) -> bytes:
    """Token 40 + i is a letter; 48 and 49 are the halves of one character."""
    return {48: b"\xc3", 49: b"\xa9"}.get(token, bytes([97 + token % 26]))


class Greedy:
    """Drafts what the fake model will choose: everything is accepted."""

    def __init__(self, base: FakeBase, tokens: list[int], heads: int) -> None:
        self.base, self.tokens, self.heads = base, tokens, heads

    def draft(self, hidden: npt.NDArray[np.float32], roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        history = list(self.tokens)
        for _ in range(self.heads):
            history.append(int(self.base.logits_of(history).argmax()))
        return [history[-self.heads :] for _ in trees]


def start(depth: int, request: Request, eog: frozenset[int] = frozenset(), context: int = 500) -> Generation:
    base = FakeBase()
    generation = Generation(base, piece, eog, request, context=context, plan=FixedPlan(Tree.chain(depth)))
    if depth:
        generation.slot.drafter = Greedy(base, generation.slot.tokens, depth)
    return generation


@pytest.mark.parametrize("stop", ["", "u", "qx", "longer than all"])
def test_drafting_changes_neither_text_nor_reason(stop: str) -> None:
    plain, drafted = (start(d, Request([3, 4], 40, stop=(stop,) if stop else ())) for d in (0, 5))
    assert (plain.run(), plain.tokens, plain.finish_reason) == (drafted.run(), drafted.tokens, drafted.finish_reason)
    assert drafted.slot.stats.acceptance_length > 2, "the drafts must have been accepted, or nothing was tested"


def test_a_stop_string_that_spans_tokens_is_cut_off_and_ends_the_text() -> None:
    whole = start(0, Request([3, 4], 40)).run()
    stop = whole[7:10]
    generation = start(5, Request([3, 4], 40, stop=("never", stop)))
    assert generation.run() == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop" and len(generation.tokens) == whole.index(stop) + 3


def test_an_end_token_within_an_accepted_path_ends_the_text() -> None:
    whole = start(0, Request([3, 4], 40))
    whole.run()
    tokens = whole.tokens
    generation = start(5, Request([3, 4], 40), eog=frozenset({tokens[7]}))
    generation.run()
    assert generation.tokens == tokens[: tokens.index(tokens[7]) + 1] and generation.finish_reason == "stop"


def test_length_and_context_end_the_text() -> None:
    generation = start(5, Request([3, 4], 7))
    generation.run()
    assert len(generation.tokens) == 7 and generation.finish_reason == "length"
    generation = start(5, Request([3, 4], 100), context=12)
    generation.run()
    assert len(generation.slot.tokens) == 12 and generation.finish_reason == "length"


def test_streamed_pieces_make_up_the_text() -> None:
    pieces = list(start(3, Request([3, 4], 30, stop=("zz",))))
    assert "".join(pieces) == start(3, Request([3, 4], 30, stop=("zz",))).run() and len(pieces) > 3


def test_a_prompt_that_does_not_fit_names_both_numbers() -> None:
    with pytest.raises(ContextError, match="12 tokens, the context 12"):
        start(0, Request([1] * 12, 5), context=12)
    with pytest.raises(UsageError, match="empty"):
        start(0, Request([], 5))
    with pytest.raises(UsageError, match="max_tokens 0"):
        start(0, Request([1], 0))


def test_text_stream_never_splits_a_character() -> None:
    stream = TextStream()
    assert not stream.feed(b"\xc3") and stream.take() == ""
    stream.feed(b"\xa9!")
    assert stream.take() == "é!"
    stream.feed(b"\xe2\x82")
    assert stream.take() == "" and stream.finish() == "�"


def test_text_stream_holds_back_what_may_become_a_stop_string() -> None:
    stream = TextStream(["END", "NO"])
    assert not stream.feed(b"abcE") and stream.take() == "abc"
    assert not stream.feed(b"N") and stream.take() == ""
    assert (not stream.feed(b"O") and stream.take() == "") or stream.stopped
    stream = TextStream(["END"])
    stream.feed(b"xEN")
    stream.feed(b"x")
    assert stream.take() == "xENx"
    assert stream.feed(b"..ENDmore") and stream.finish() == ".."
    with pytest.raises(UsageError, match="empty"):
        TextStream([""])
