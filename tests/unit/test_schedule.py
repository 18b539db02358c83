"""Schedule: what is asked for is taken, what is left open fits the amount of text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.training.options import TrainOptions
from model.training.schedule import FEWEST_POSITIONS, MOST_POSITIONS, STEPS, choose_schedule

OPEN = TrainOptions()


@pytest.mark.parametrize("n_positions", [60_000, 200_000, 1_000_000, 3_000_000, 50_000_000])
def test_some_hundreds_of_steps_where_there_is_text_enough(n_positions: int) -> None:
    schedule = choose_schedule(OPEN, n_positions, 1024)
    steps = schedule.epochs * n_positions / schedule.positions
    assert steps >= STEPS
    assert FEWEST_POSITIONS <= schedule.positions <= MOST_POSITIONS


def test_little_text_is_seen_more_often_in_smaller_steps() -> None:
    little = choose_schedule(OPEN, 20_000, 1024)
    much = choose_schedule(OPEN, 20_000_000, 1024)
    assert little.epochs > much.epochs > 0
    assert little.positions < much.positions
    assert little.learning_rate < much.learning_rate
    assert choose_schedule(OPEN, 1, 1024).epochs == choose_schedule(OPEN, 20_000, 1024).epochs


def test_what_is_asked_for_is_taken() -> None:
    asked = replace(OPEN, batch_size=3, epochs=5, learning_rate=0.25)
    schedule = choose_schedule(asked, 10**6, 64)
    assert (schedule.positions, schedule.epochs, schedule.learning_rate) == (192, 5, 0.25)


def test_accumulated_batches_count_as_one_step() -> None:
    one = choose_schedule(OPEN, 10**6, 1024)
    four = choose_schedule(replace(OPEN, gradient_accumulation_steps=4), 10**6, 1024)
    assert four.positions == one.positions // 4
    assert four.learning_rate == pytest.approx(one.learning_rate, rel=0.05)
