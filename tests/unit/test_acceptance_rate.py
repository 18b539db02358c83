"""Acceptance rates: from what is expected to what was seen, of one sequence and of all."""

from __future__ import annotations

import numpy as np
import pytest

from model.planning.acceptance_rate import (
    AGREEING,
    ALONE,
    CAUTION,
    DISAGREEING,
    OWN_MEMORY,
    PRIOR_WEIGHT,
    SHARED_MEMORY,
    AcceptanceRate,
    Calibration,
)


def test_it_starts_at_the_prior_and_follows_what_is_seen() -> None:
    rate = AcceptanceRate(0.4)
    assert rate.mean == pytest.approx(0.4)
    rate.record(True)
    assert rate.mean == pytest.approx((1 + PRIOR_WEIGHT * 0.4) / (1 + PRIOR_WEIGHT))
    for _ in range(2000):
        rate.record(True)
    assert rate.mean > 0.95
    assert rate.tries == pytest.approx(SHARED_MEMORY)


def test_what_was_long_ago_counts_for_less() -> None:
    rate = AcceptanceRate(0.5, OWN_MEMORY)
    for _ in range(500):
        rate.record(True)
    for _ in range(int(OWN_MEMORY)):
        rate.record(False)
    assert rate.mean < 0.5


def test_it_finds_the_true_rate() -> None:
    """The mean over 400 estimates of 0.3 from 64 tries; 0.03 are more than 8 standard errors."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(400):
        rate = AcceptanceRate(0.3)
        for right in rng.random(200) < 0.3:
            rate.record(bool(right))
        means.append(rate.mean)
    assert np.mean(means) == pytest.approx(0.3, abs=0.03)


def test_a_sequence_begins_where_the_others_are_and_goes_its_own_way() -> None:
    calibration = Calibration((0.5, 0.5))
    first = calibration.of_sequence()
    for _ in range(100):
        first.record(0, True)
    second = calibration.of_sequence()
    untried = 0.5 - CAUTION * (0.25 / PRIOR_WEIGHT) ** 0.5
    assert second.probability(0) > 0.85 and second.probability(3) == pytest.approx(untried)
    for _ in range(24):
        second.record(0, False)
    assert second.probability(0) < 0.4 < first.probability(0)


def test_a_guess_that_others_have_too_is_expected_to_be_better() -> None:
    sequence = Calibration((0.4,)).of_sequence()
    alone, agreeing, disagreeing = (sequence.probability(k) for k in (ALONE, AGREEING, DISAGREEING))
    assert disagreeing < alone < agreeing


def test_promises_are_kept_or_are_a_little_too_low() -> None:
    """Guesses of ten kinds, right as often as each kind's prior does not say: found out."""
    rng = np.random.default_rng(1)
    truth = rng.permutation(np.linspace(0.05, 0.95, 10))
    calibration = Calibration(tuple(np.linspace(0.05, 0.95, 10)))
    sequence = calibration.of_sequence()
    promised = np.zeros(10)
    for _ in range(300):
        for kind in range(10):
            promised[kind] = sequence.probability(3 * kind)
            sequence.record(3 * kind, bool(rng.random() < truth[kind]))
    assert np.abs(promised - truth).mean() < 0.15
    assert -0.12 < (promised - truth).mean() < 0
    assert np.abs(np.linspace(0.05, 0.95, 10) - truth).mean() > 0.2, "the control: priors"
