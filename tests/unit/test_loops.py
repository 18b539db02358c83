"""Texts that run in a circle are cut behind one pass; texts that do not are left alone."""

from __future__ import annotations

import random

import pytest

from model.decoding.loops import GRAM, LOOP, count_repeats, without_loop
from model.evaluation.figures import repeated_ngrams

NEW = random.Random(0).sample(range(10_000), 400)


@pytest.mark.parametrize("period", [1, 2, 5, 8, 30, 100])
def test_a_circle_is_cut_behind_one_pass(period: int) -> None:
    text = NEW[:50] + NEW[100 : 100 + period] * 200
    cut, looped = without_loop(text)
    assert looped
    assert cut == text[: 50 + period + GRAM - 1], (
        "one pass, and what the last new 8-gram reaches into the next"
    )
    assert count_repeats([cut]) == (0, len(cut) - GRAM + 1)


@pytest.mark.parametrize(
    "text",
    [
        NEW,
        NEW + NEW[100 : 100 + LOOP + GRAM - 2],
        [t for i in range(50) for t in (*NEW[:7], 10_000 + i)],
        NEW[:5],
        [],
    ],
    ids=["new", "a passage said twice", "a list that counts", "short", "empty"],
)
def test_negative_control_what_is_no_circle_stays(text: list[int]) -> None:
    assert without_loop(text) == (text, False)


def test_a_passage_said_twice_that_is_one_token_longer_is_cut() -> None:
    """The limit is where the policy says that it is."""
    assert without_loop(NEW + NEW[100 : 100 + LOOP + GRAM - 1]) == (
        NEW + NEW[100 : 100 + GRAM - 1],
        True,
    )


def test_repeats_are_counted_as_the_benchmark_counts_them() -> None:
    texts = [random.Random(i).choices(range(3), k=100) for i in range(5)] + [[1, 2, 3]]
    repeated, total = count_repeats(texts)
    assert repeated / total == repeated_ngrams(texts) and total == 5 * 93
    by_hand = 0
    for text in texts:
        grams = [tuple(text[i : i + GRAM]) for i in range(len(text) - GRAM + 1)]
        by_hand += len(grams) - len(set(grams))
    assert repeated == by_hand
