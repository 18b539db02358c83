"""Acceptance rates: they begin at the prior, go where the records go, and forget."""

from __future__ import annotations

import pytest

from model.planning.acceptance_rate import (
    DECAY,
    MEMORY,
    PRIOR_WEIGHT,
    SHARED_WEIGHT,
    AcceptanceRate,
)


def test_nothing_seen_is_the_prior() -> None:
    assert AcceptanceRate(0.7).mean == pytest.approx(0.7)


def test_the_prior_counts_for_so_many_tries() -> None:
    rate = AcceptanceRate(0.5)
    for accepted in (True, True, False, True):
        rate.record(accepted)
    assert rate.mean == pytest.approx((3 + 0.5 * PRIOR_WEIGHT) / (4 + PRIOR_WEIGHT))


@pytest.mark.parametrize("prior", [0.0, 0.4, 1.0])
def test_much_evidence_outweighs_the_prior(prior: float) -> None:
    rate = AcceptanceRate(prior)
    for i in range(3000):
        rate.record(i % 3 == 0)
    assert rate.mean == pytest.approx(1 / 3, abs=0.001)


def test_decay_keeps_the_share_and_lets_the_prior_come_back() -> None:
    rate = AcceptanceRate(0.5)
    for _ in range(20):
        rate.record(True)
    before = rate.mean
    rate.decay()
    assert (rate.tries, rate.accepted) == pytest.approx((20 * DECAY, 20 * DECAY))
    assert 0.5 < rate.mean < before
    for _ in range(300):
        rate.decay()
    assert rate.mean == pytest.approx(0.5)


def test_after_decay_new_records_count_for_more() -> None:
    fresh, tired = AcceptanceRate(0.5), AcceptanceRate(0.5)
    for rate in (fresh, tired):
        for _ in range(20):
            rate.record(True)
    fresh.decay(0.1)
    for rate in (fresh, tired):
        for _ in range(5):
            rate.record(False)
    assert fresh.mean < tired.mean


def test_a_ratio_to_what_another_estimate_expects() -> None:
    rate = AcceptanceRate(1.0)
    for i in range(4000):
        rate.record(i % 4 == 0, 0.5)
    assert rate.mean == pytest.approx(0.5, abs=0.01), "a quarter where half was expected"


def test_what_one_sequence_shows_is_where_the_next_one_begins() -> None:
    shared = AcceptanceRate(0.5)
    first = AcceptanceRate(shared)
    other = AcceptanceRate(0.5)
    for _ in range(10):
        first.record(False)
    known = 0.5 * PRIOR_WEIGHT / (10 + PRIOR_WEIGHT)
    second = AcceptanceRate(shared)
    assert second.mean == pytest.approx(known) and other.mean == 0.5
    second.record(True)
    known = (1 + 0.5 * PRIOR_WEIGHT) / (11 + PRIOR_WEIGHT)
    assert second.mean == pytest.approx((1 + SHARED_WEIGHT * known) / (1 + SHARED_WEIGHT))


def test_of_all_sequences_the_latest_tries_are_remembered() -> None:
    shared = AcceptanceRate(0.5)
    first = AcceptanceRate(shared)
    for _ in range(1000):
        first.record(False)
    assert shared.tries <= MEMORY and shared.mean < 0.1
    second = AcceptanceRate(shared)
    for _ in range(2 * int(MEMORY)):
        second.record(True)
    assert shared.mean > 0.8
    second.forget(0.0)
    assert second.mean == shared.mean == 0.5
