"""Draft sources: what they expect follows what they have shown."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import new_sequence
from simulation import GOOD, ChanceDrafter, heads_source

from model.decoding.draft import Continuation, TreeDraft
from model.decoding.drafters.drafter import HEADS, NGRAM, ConstantDrafter
from model.decoding.sequence import Sequence
from model.planning.acceptance_rate import PRIOR_WEIGHT, SHARED_WEIGHT
from model.planning.sources import (
    FIRST_ACCEPTANCE,
    LATER_ACCEPTANCE,
    ContinuationHistory,
    ContinuationSource,
    TreeSource,
)
from model.trees.search import expected_lengths, grow


class Fixed:
    """A continuation drafter that always says the same."""

    name = NGRAM

    def __init__(self, tokens: list[int], agreeing: int) -> None:
        self.tokens = tokens
        self.agreeing = agreeing

    def propose(self, most: int) -> tuple[list[int], int]:
        return self.tokens[:most], self.agreeing


def continuing(drafter: Fixed | ChanceDrafter) -> Sequence:
    sequence = new_sequence([0], 99)
    sequence.continuation_drafters[NGRAM] = drafter
    return sequence


def test_an_untried_tree_is_expected_to_bring_what_the_search_says() -> None:
    paths = grow(GOOD, 15)
    source = TreeSource(HEADS, paths, GOOD, [0.1, 0.2, 0.3, 0.4])
    for untried in (True, False):
        expectation = source.history().expect(1, untried=untried)
        assert expectation.tokens == pytest.approx(expected_lengths(GOOD, paths) - 1)
        assert expectation.missed[0] == 1.0
        assert expectation.missed[-1] == pytest.approx(1 - GOOD[0].sum(), abs=0.05)
    depths = [0, *np.maximum.accumulate([len(path) for path in paths])]
    assert source.draft_seconds.tolist() == pytest.approx([depth / 10 for depth in depths])
    assert source.max_nodes == 15 and source.max_depth == len(GOOD)
    assert source.max_leaves == max(len(tree.leaves) for tree in source.trees)


def test_trees_are_expected_to_bring_what_they_have_brought() -> None:
    history = heads_source().history()
    before = history.expect(1, untried=False)
    for _ in range(50):
        history.learn([7], [8, 9])  # a wrong guess at depth 1
    wrong = history.expect(1, untried=False)
    assert wrong.tokens[-1] < 0.1 * before.tokens[-1]
    assert history.expect(1, untried=True).tokens == pytest.approx(before.tokens)
    assert [rate.tries > 0 for rate in history.by_depth] == [True, False, False, False]
    for _ in range(500):
        history.learn([8, 9], [8, 9, 1])  # a chain of two, both right
    right = history.expect(1, untried=False)
    assert right.tokens[1] > 0.9 and right.tokens[2] > 1.7
    history.learn(None, [8])
    assert history.expect(1, untried=False).tokens == pytest.approx(right.tokens)


def test_a_tree_source_needs_its_drafter_and_a_hidden_state() -> None:
    history = heads_source().history()
    sequence = new_sequence([0], 99)
    assert not history.available(sequence) and history.look(sequence, 4) == 0
    sequence.tree_drafters[HEADS] = ConstantDrafter(0)
    assert history.available(sequence) and history.look(sequence, 4) == 0
    sequence.hidden = np.zeros((1, 4), np.float32)
    assert history.look(sequence, 4) == 1
    draft = history.draft(3)
    assert isinstance(draft, TreeDraft) and draft.source == HEADS and len(draft.tree) == 4


def test_a_tree_source_without_paths_drafts_nothing() -> None:
    source = TreeSource(HEADS, [], GOOD, [])
    assert (source.max_nodes, source.max_leaves, source.max_depth) == (0, 0, 0)
    sequence = new_sequence([0], 99)
    sequence.tree_drafters[HEADS] = ConstantDrafter(0)
    assert not source.history().available(sequence)


@pytest.mark.parametrize(
    ("agreeing", "strength"), [(0, 0), (1, 0), (2, 2), (3, 2), (4, 3), (31, 5), (32, 6), (999, 6)]
)
def test_the_strength_of_a_continuation_is_the_length_of_its_match(
    agreeing: int, strength: int
) -> None:
    history = ContinuationSource(NGRAM, 3).history()
    sequence = continuing(Fixed([4, 5, 6, 7, 8, 9, 10], agreeing))
    assert history.look(sequence, 2) == strength
    assert history.draft(2) == Continuation(NGRAM, [4, 5, 6, 7, 8], 2), "2 ahead, 3 of its own"
    sequence.continuation_drafters.clear()
    assert history.look(sequence, 2) == 0


def test_a_source_may_have_its_own_priors() -> None:
    source = ContinuationSource("recycled", 2, first_acceptance=(0.0, 0.3), later_acceptance=0.5)
    expectation = source.history().expect(1, untried=False)
    assert source.strengths == 1
    assert expectation.tokens.tolist() == pytest.approx([0.0, 0.3, 0.45])


def test_an_untried_continuation_is_expected_to_bring_what_the_priors_say() -> None:
    history = ContinuationSource(NGRAM, 3).history()
    for strength, first in enumerate(FIRST_ACCEPTANCE):
        expectation = history.expect(strength, untried=False)
        chain = first * LATER_ACCEPTANCE ** np.arange(3)
        assert expectation.tokens.tolist() == pytest.approx([0.0, *chain.cumsum()])
        assert expectation.missed.tolist() == pytest.approx([1.0, *[1 - first] * 3])


def rates(history: ContinuationHistory, strength: int) -> tuple[float, ...]:
    first = history.first[strength]
    later = history.later[strength]
    tries = sum(rate.tries for rate in later)
    return first.tries, first.accepted, tries, sum(rate.accepted for rate in later)


def test_continuations_learn_by_strength_the_first_token_apart_from_later_ones() -> None:
    history = ContinuationSource(NGRAM, 3).history()
    sequence = continuing(Fixed([4, 5, 6, 7], 8))
    history.look(sequence, 1)
    history.learn(None, [4, 5, 9])
    assert rates(history, 4) == (1, 1, 2, 1)
    history.learn(None, [9])
    assert rates(history, 4) == (2, 1, 2, 1)
    history.learn(None, [4, 5, 6, 7, 8])
    assert rates(history, 4) == (3, 2, 5, 4)
    assert rates(history, 3) == (0, 0, 0, 0)
    first = 1 - history.expect(4, untried=False).missed[1]
    shared = (2 + PRIOR_WEIGHT * FIRST_ACCEPTANCE[4]) / (3 + PRIOR_WEIGHT)
    assert first == pytest.approx((2 + SHARED_WEIGHT * shared) / (3 + SHARED_WEIGHT))
    history.decay(0.5)
    assert rates(history, 4) == (1.5, 1, 2.5, 2)


def test_long_runs_say_nothing_about_short_ones() -> None:
    history = ContinuationSource(NGRAM, 15).history()
    before = history.expect(6, untried=False)
    right = list(range(100, 117))
    history.look(continuing(Fixed(right, 99)), 2)
    for _ in range(5):
        history.learn(None, right)
    for _ in range(5):
        history.learn(None, [100, 101, 9])
    after = history.expect(6, untried=False)
    gains_before = np.diff(before.tokens)
    gains = np.diff(after.tokens)
    assert gains[2] < gains_before[2], "half of them end there"
    assert gains[14] / gains[8] > 1.5 * gains_before[14] / gains_before[8], "long ones go on"


def test_a_new_sequence_begins_with_what_others_have_shown() -> None:
    for source in (heads_source(), ContinuationSource(NGRAM, 3)):
        first = source.history()
        if isinstance(first, ContinuationHistory):
            first.look(continuing(Fixed([4, 5, 6, 7], 8)), 1)
        before = first.expect(4 if source.name == NGRAM else 1, untried=False)
        for _ in range(30):
            first.learn([7], [8, 9])
        strength = 4 if source.name == NGRAM else 1
        second = source.history().expect(strength, untried=False)
        assert second.tokens[-1] < 0.3 * before.tokens[-1]


def test_continuations_come_to_know_the_true_rate() -> None:
    history = ContinuationSource(NGRAM, 7).history()
    drafter = ChanceDrafter(NGRAM, new_sequence([0], 99), rate=0.3, agreeing=32, seed=1)
    sequence = continuing(drafter)
    for _ in range(2000):
        history.look(sequence, 0)
        history.learn(None, [100 + len(sequence.tokens) + i for i in range(8)])
    expectation = history.expect(6, untried=False)
    assert expectation.missed[1] == pytest.approx(0.7, abs=0.04)  # 4 standard deviations
    assert expectation.tokens[-1] == pytest.approx(0.3 / 0.7, abs=0.1)
