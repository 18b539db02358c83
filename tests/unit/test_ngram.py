"""N-gram continuations: the longest match, the latest position, and sequences that loop."""

from __future__ import annotations

import random
from typing import Any

import pytest

from model.decoding.drafters.drafter import likeliest_chain
from model.decoding.drafters.ngram import LONGEST, MAX_MATCHES, PRIORS, SHORTEST, NgramDrafter


def propose(index: NgramDrafter, most: int) -> tuple[list[int], int]:
    """The best continuation, and how many tokens before it agree; 0: there is none."""
    cursor = index.start()
    if cursor is None or not most:
        return [], 0
    return likeliest_chain(index, most), cursor[0].agree


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
            assert propose(index, 5) == ([], 0)
        elif sum(tokens[-2:] == tokens[i : i + 2] for i in range(len(tokens) - 2)) <= MAX_MATCHES:
            assert propose(index, 5) == by_search(tokens, 5)
            matches += 1
        tokens += [rng.randrange(alphabet) for _ in range(rng.randrange(1, 4))]
    assert matches > 10, "nothing was compared"


def test_of_equal_matches_the_latest_counts() -> None:
    assert propose(NgramDrafter([1, 2, 7, 1, 2, 8, 1, 2]), 1) == ([8], 2)
    assert propose(NgramDrafter([5, 1, 2, 7, 4, 1, 2, 8, 5, 1, 2]), 2) == ([7, 4], 3), (
        "a longer one is better"
    )


def test_a_text_in_circles_is_continued_for_as_long_as_is_asked() -> None:
    assert propose(NgramDrafter([9, 1, 2, 3, 1, 2, 3, 1, 2]), 7) == ([3, 1, 2, 3, 1, 2, 3], 5)
    assert propose(NgramDrafter([4, 4, 4]), 3) == ([4, 4, 4], 2)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 2, 1]])
def test_without_a_match_there_is_nothing(tokens: list[int]) -> None:
    assert propose(NgramDrafter(tokens), 4) == ([], 0)


def test_nothing_is_proposed_where_nothing_is_asked_for() -> None:
    assert propose(NgramDrafter([1, 2, 1, 2]), 0) == ([], 0)


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
        propose(index, 8)
        worst = max(worst, Counting.reads - before)
    assert worst <= 2 * MAX_MATCHES * LONGEST + 8 * 8 * MAX_MATCHES


def test_all_that_followed_is_guessed_the_longest_match_first() -> None:
    #            match of 3: 4        match of 2: 5       the same again: 5
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3, 5, 7, 1, 2, 3]
    index = NgramDrafter(tokens)
    cursor = index.start()
    assert cursor is not None
    guesses = index.guesses(cursor)
    assert [token for token, _ in guesses] == [4, 5]
    assert PRIORS[guesses[0][1]] > PRIORS[guesses[1][1]]
    further = index.advance(cursor, 5)
    assert further is not None and [match.at for match in further] == [12, 8]
    assert index.advance(cursor, 6) is None
    assert [token for token, _ in index.guesses(cursor)] == [4, 5], "cursors stay as they are"


def test_a_longer_match_is_another_kind() -> None:
    kinds = []
    for length in (2, 4, 8, 16, 32, 40):
        run = list(range(100, 100 + length))
        index = NgramDrafter([*run, 1, *run])
        cursor = index.start()
        assert cursor is not None
        kinds.append(index.guesses(cursor)[0][1])
    assert kinds == [2, 3, 4, 5, 6, 6]
