"""Sequences and decoders: from a prompt to the end of the output, on the fake base model."""

from __future__ import annotations

import collections.abc as abc

import numpy as np
import numpy.typing as npt
import pytest
from fake_base import FakeBase

from model.decoding.decoder import Decoder
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import HEADS
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import Sequence
from model.errors import ContextError, UsageError
from model.trees.tree import Tree


class Letters:
    """Token 40 + i is a letter; 48 and 49 are the halves of one character."""

    n_vocab = 50

    def __init__(self, eog: frozenset[int] = frozenset()) -> None:
        self.eog = eog

    def piece(self, token: int) -> bytes:
        return {48: b"\xc3", 49: b"\xa9"}.get(token, bytes([97 + token % 26]))


class Greedy:
    """Drafts what the fake model will choose: everything is accepted."""

    name = HEADS

    def __init__(self, base: FakeBase, tokens: list[int], depth: int) -> None:
        self.base, self.tokens, self.depth = base, tokens, depth

    def draft(
        self, hidden: npt.NDArray[np.float32], roots: abc.Sequence[int], trees: abc.Sequence[Tree]
    ) -> list[list[int]]:
        history = list(self.tokens)
        for _ in range(self.depth):
            history.append(int(self.base.logits_of(history).argmax()))
        return [history[-self.depth :] for _ in trees]


def generate(
    depth: int, request: Request, eog: frozenset[int] = frozenset(), context: int = 500
) -> tuple[str, Sequence]:
    base = FakeBase()
    decoder = Decoder(base, Letters(eog), FixedPolicy(Tree.chain(depth)), context=context)
    sequence = decoder.start(request)
    if depth:
        sequence.tree_drafters[HEADS] = Greedy(base, sequence.tokens, depth)
    text = "".join(output.text for output in decoder.stream(sequence))
    return text, sequence


def request(max_tokens: int, *stop: str) -> Request:
    return Request(prompt=[3, 4], max_tokens=max_tokens, stop=stop)


@pytest.mark.parametrize("stop", [(), ("u",), ("qx",), ("longer than all",)])
def test_drafting_changes_neither_text_nor_reason(stop: tuple[str, ...]) -> None:
    (plain_text, plain), (text, drafted) = (generate(depth, request(40, *stop)) for depth in (0, 5))
    assert (plain_text, plain.tokens, plain.finish_reason) == (
        text,
        drafted.tokens,
        drafted.finish_reason,
    )
    assert drafted.statistics.acceptance_length > 2, (
        "the drafts must have been accepted, or nothing was tested"
    )


def test_a_stop_string_that_spans_tokens_is_cut_off_and_ends_the_text() -> None:
    whole, _ = generate(0, request(40))
    stop = whole[7:10]
    text, sequence = generate(5, request(40, "never", stop))
    assert text == whole[: whole.index(stop)]
    assert sequence.finish_reason == "stop" and sequence.n_new == whole.index(stop) + 3


def test_an_end_token_within_an_accepted_path_ends_the_sequence() -> None:
    _, whole = generate(0, request(40))
    tokens = whole.new_tokens
    text, sequence = generate(5, request(40), eog=frozenset({tokens[7]}))
    assert (
        sequence.new_tokens == tokens[: tokens.index(tokens[7]) + 1]
        and sequence.finish_reason == "stop"
    )
    assert len(text) <= tokens.index(tokens[7]), "an end-of-generation token has no text"


def test_length_and_context_end_the_sequence() -> None:
    _, sequence = generate(5, request(7))
    assert sequence.n_new == 7 and sequence.finish_reason == "length"
    _, sequence = generate(5, request(100), context=12)
    assert len(sequence.tokens) == 12 and sequence.finish_reason == "length"
    _, sequence = generate(0, Request(prompt=[3, 4]), context=12)
    assert len(sequence.tokens) == 12, "without max_tokens the context decides"


def test_outputs_say_what_was_drafted() -> None:
    base = FakeBase()
    decoder = Decoder(base, Letters(), FixedPolicy(Tree.chain(3)), context=500)
    sequence = decoder.start(request(30), logprobs=2)
    sequence.tree_drafters[HEADS] = Greedy(base, sequence.tokens, 3)
    outputs = [token for output in decoder.stream(sequence) for token in output.tokens]
    assert [token.id for token in outputs] == sequence.new_tokens
    accepted = sum(sequence.statistics.accepted)
    assert sum(token.drafted for token in outputs) == accepted > 15
    for i, token in enumerate(outputs):
        logits = base.logits_of(sequence.tokens[: 2 + i]).astype(np.float64)
        logprob = logits[token.id] - np.log(np.exp(logits).sum())
        assert token.logprob == pytest.approx(logprob, abs=1e-5) and len(token.top) == 2
        assert token.top[0][1] == pytest.approx(token.logprob), "greedy: the likeliest one"


def test_a_stream_that_is_closed_frees_its_slot() -> None:
    base = FakeBase()
    decoder = Decoder(base, Letters(), FixedPolicy(), context=500)
    sequence = decoder.start(request(400))
    outputs = decoder.stream(sequence)
    next(outputs)
    assert decoder.scheduler.has_unfinished
    outputs.close()  # type: ignore[attr-defined]
    assert not decoder.scheduler.has_unfinished and base.cells == []


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([1] * 12, {}, ContextError, "12 tokens, the context 12"),
        ([], {}, UsageError, "the prompt is empty"),
        ([1, 50], {}, UsageError, "token 50: the vocabulary has 50"),
        ([-1], {}, UsageError, "token -1"),
        ([1], {"max_tokens": 0}, UsageError, "max_tokens 0 is below 1"),
        ([1], {"max_tokens": -1, "echo": True}, UsageError, "max_tokens -1"),
        ([1], {"stop": ("",)}, UsageError, "stop string is empty"),
    ],
)
def test_what_cannot_be_generated_is_said(
    prompt: list[int], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Sequence(prompt, Letters(), SamplingParams(), context=12, **options)  # type: ignore[arg-type]


def test_a_bias_of_an_unknown_token_is_said() -> None:
    with pytest.raises(UsageError, match="token 99"):
        Sequence([1], Letters(), SamplingParams(logit_bias={99: 1.0}), context=12)


def test_without_a_seed_every_sequence_draws_anew() -> None:
    params = SamplingParams(temperature=1.0, seed=None)
    seeds = {Sequence([1], Letters(), params, context=12).sampler.params.seed for _ in range(5)}
    assert len(seeds) > 1 and None not in seeds  # five equal seeds of 2^32: never
