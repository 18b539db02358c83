"""N-gram continuations: the longest match, the latest position, and sequences that loop."""

from __future__ import annotations

import random
from typing import Any

import pytest

from model.decoding.drafters.ngram import LONGEST, MAX_MATCHES, SHORTEST, NgramDrafter


def by_search(tokens: list[int], most: int) -> tuple[list[int], int]:
    """The same by looking at every place: the oracle, without its limits on places."""
    best = 0
    place = -1
    end = len(tokens)
    for at in range(end - 2, -1, -1):
        agree = 0
        while agree < min(LONGEST, at + 1) and tokens[at - agree] == tokens[end - 1 - agree]:
            agree += 1
        if agree >= SHORTEST and agree > best:
            best = agree
            place = at
    out = list(tokens)
    for i in range(most if best else 0):
        out.append(out[place + 1 + i])
    return out[end:], best


@pytest.mark.parametrize("alphabet", [6, 12, 24])
def test_the_longest_match_is_found(alphabet: int) -> None:
    rng = random.Random(alphabet)
    tokens = [rng.randrange(alphabet) for _ in range(4)]
    matches = 0
    index = NgramDrafter(tokens)
    for _ in range(240):
        if all(tokens[-2:] != tokens[i : i + 2] for i in range(len(tokens) - 2)):
            assert index.propose(5) == ([], 0)
        elif sum(tokens[-2:] == tokens[i : i + 2] for i in range(len(tokens) - 2)) <= MAX_MATCHES:
            assert index.propose(5) == by_search(tokens, 5)
            matches += 1
        tokens += [rng.randrange(alphabet) for _ in range(rng.randrange(1, 4))]
    assert matches > 10, "nothing was compared"


def test_of_equal_matches_the_latest_counts() -> None:
    assert NgramDrafter([1, 2, 7, 1, 2, 8, 1, 2]).propose(1) == ([8], 2)
    assert NgramDrafter([5, 1, 2, 7, 4, 1, 2, 8, 5, 1, 2]).propose(2) == ([7, 4], 3), (
        "a longer one is better"
    )


def test_a_text_in_circles_is_continued_for_as_long_as_is_asked() -> None:
    assert NgramDrafter([9, 1, 2, 3, 1, 2, 3, 1, 2]).propose(7) == ([3, 1, 2, 3, 1, 2, 3], 5)
    assert NgramDrafter([4, 4, 4]).propose(3) == ([4, 4, 4], 2)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 2, 1]])
def test_without_a_match_there_is_nothing(tokens: list[int]) -> None:
    assert NgramDrafter(tokens).propose(4) == ([], 0)


def test_nothing_is_proposed_where_nothing_is_asked_for() -> None:
    assert NgramDrafter([1, 2, 1, 2]).propose(0) == ([], 0)


def test_the_time_per_token_does_not_grow_with_the_text() -> None:
    """Work is counted, not timed: positions and tokens compared per proposal have a bound."""

    class Counting(list[int]):
        reads = 0

        def __getitem__(self, i: Any) -> Any:
            Counting.reads += 1
            return super().__getitem__(i)

    tokens = Counting([1, 1])
    index = NgramDrafter(tokens)
    worst = 0
    for i in range(3000):
        tokens.append(1 if i % 50 else i)
        before = Counting.reads
        index.propose(8)
        worst = max(worst, Counting.reads - before)
    assert worst <= 2 * MAX_MATCHES * LONGEST + 4
