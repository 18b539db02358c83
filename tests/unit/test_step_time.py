"""The step-time model: first the curve, then what steps took; and which go without drafts."""

from __future__ import annotations

import pytest

from model.planning.step_time import (
    CONTEXT_STRIDE,
    DRAFTED_IN_A_ROW,
    FIRST_PLAIN_STEPS,
    FORGETTING,
    MAX_CONTEXTS,
    MAX_DRIFT,
    SMOOTHING,
    STRIDE,
    StepTimeModel,
)
from model.trees.costs import CostCurve

SIZES = (1, 2, 3, 4, 6, 10)
TIMES = (1.0, 1.6, 2.2, 1.7, 3.0, 4.6)
CURVE = CostCurve((0,), SIZES, (TIMES,))


def take(model: StepTimeModel, n_sequences: int, n_rows: int, seconds: float) -> None:
    model.begin_step(n_sequences, 0)
    model.record(n_rows, seconds)


def seconds_at(model: StepTimeModel, n_sequences: int, n_rows: int) -> float:
    """Of a drafted step; those of one row are not on offer, but the others drift alike."""
    offers = dict(model.offers(n_sequences, 0, 99))
    if n_rows == n_sequences:
        return offers[2] / TIMES[1]
    return offers[n_rows]


def plain_due(model: StepTimeModel, n_sequences: int) -> bool:
    model.begin_step(n_sequences, 0)
    return model.plain_step_due


def test_before_anything_was_seen_the_curve_holds() -> None:
    model = StepTimeModel(CURVE, 10)
    assert model.offers(1, 0, 10) == list(zip(SIZES, TIMES, strict=True))[1:], (
        "sizes that were not measured are not on offer"
    )
    assert model.offers(3, 0, 6) == [(4, 1.7), (6, 3.0)]
    assert [model.plain_seconds(n, 0) for n in (1, 3, 4, 5)] == pytest.approx([1.0, 2.2, 1.7, 2.35])


def test_beyond_the_measured_sizes_a_row_costs_what_it_cost_on_average() -> None:
    flat = CostCurve((0,), (1, 2, 4, 10), ((1.0, 2.0, 3.7, 3.7),))
    model = StepTimeModel(flat, 40)
    offered = dict(model.offers(1, 0, 99))
    further = [n for n in offered if n > 10]
    assert further == [n for n in range(11, 41) if n % STRIDE == 0]
    per_row = (3.7 - 1.0) / 9
    for n in further:
        assert offered[n] == pytest.approx(3.7 + (n - 10) * per_row)
    assert model.plain_seconds(13, 0) == pytest.approx(3.7 + 3 * per_row)


def test_a_curve_that_knows_more_rows_than_are_allowed_keeps_them() -> None:
    assert StepTimeModel(CURVE, 4).offers(1, 0, 99)[-1][0] == 10


def test_the_context_counts() -> None:
    curve = CostCurve((0, 1024), (1, 2), ((1.0, 1.5), (2.0, 3.5)))
    model = StepTimeModel(curve, 2)
    assert model.plain_seconds(1, 512) == pytest.approx(1.5)
    assert dict(model.offers(1, 1024, 9)) == pytest.approx({2: 3.5})
    assert model.plain_seconds(1, CONTEXT_STRIDE - 1) == model.plain_seconds(1, 0)
    for n_context in range(0, 3 * MAX_CONTEXTS * CONTEXT_STRIDE, CONTEXT_STRIDE):
        model.plain_seconds(1, n_context)
        model.offers(1, n_context, 9)
    assert len(model._offers) <= MAX_CONTEXTS
    assert len(model._by_context) <= MAX_CONTEXTS, "a long context must not fill the memory"


def test_of_the_first_plain_steps_the_faster_one_counts() -> None:
    model = StepTimeModel(CURVE, 10)
    take(model, 1, 1, 7.0)  # a stall
    assert model.plain_seconds(1, 0) == pytest.approx(7.0)
    take(model, 1, 1, 1.2)
    assert model.plain_seconds(1, 0) == pytest.approx(1.2)
    take(model, 1, 1, 2.2)
    assert model.plain_seconds(1, 0) == pytest.approx(1.2 + SMOOTHING * 1.0)


def test_plain_and_drafted_steps_drift_apart() -> None:
    model = StepTimeModel(CURVE, 10)
    for _ in range(FIRST_PLAIN_STEPS):
        take(model, 1, 1, 1.1)
    assert seconds_at(model, 1, 4) == pytest.approx(1.1 * 1.7), "not tried: as plain steps"
    take(model, 1, 4, 3.4)
    assert seconds_at(model, 1, 4) == pytest.approx(3.4)
    assert seconds_at(model, 1, 2) == pytest.approx(2 * 1.6), "it holds for all sizes"
    take(model, 1, 4, 1.7)
    assert seconds_at(model, 1, 4) == pytest.approx(1.7 * (2 - SMOOTHING))
    assert model.plain_seconds(1, 0) == pytest.approx(1.1)


def test_only_drafted_steps_seen_hold_for_plain_ones_too() -> None:
    model = StepTimeModel(CURVE, 10)
    take(model, 1, 4, 3.4)
    assert model.plain_seconds(1, 0) == pytest.approx(2.0)


def test_plain_steps_give_drafted_ones_another_chance() -> None:
    model = StepTimeModel(CURVE, 10)
    take(model, 1, 4, 5.1)
    take(model, 1, 1, 1.0)
    assert seconds_at(model, 1, 1) == pytest.approx(3.0 - FORGETTING * 2.0)
    for _ in range(300):
        take(model, 1, 1, 1.0)
    assert seconds_at(model, 1, 1) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("factor", [1000.0, 1 / 1000])
def test_a_stall_is_cut_off(factor: float) -> None:
    model = StepTimeModel(CURVE, 10)
    take(model, 1, 4, 1.7 * factor)
    drift = seconds_at(model, 1, 4) / 1.7
    assert drift == pytest.approx(MAX_DRIFT if factor > 1 else 1 / MAX_DRIFT)


def test_each_number_of_sequences_has_its_own_drift() -> None:
    model = StepTimeModel(CURVE, 10)
    take(model, 4, 4, 3.4)
    assert model.plain_seconds(4, 0) == pytest.approx(3.4)
    assert model.plain_seconds(5, 0) == pytest.approx(2 * 2.35), "as many bits"
    assert model.plain_seconds(3, 0) == pytest.approx(2.2)
    assert model.plain_seconds(1, 0) == pytest.approx(1.0)


def test_the_first_steps_and_then_one_in_so_many_go_without_drafts() -> None:
    model = StepTimeModel(CURVE, 10)
    plain = []
    for i in range(2 * DRAFTED_IN_A_ROW + 10):
        due = plain_due(model, 1)
        if due:
            plain.append(i)
        model.record(1 if due else 4, 1.0)
    second = FIRST_PLAIN_STEPS + DRAFTED_IN_A_ROW
    assert plain == [0, 1, second, second + 1 + DRAFTED_IN_A_ROW]


def test_plain_steps_that_come_anyway_put_the_next_one_off() -> None:
    model = StepTimeModel(CURVE, 10)
    for _ in range(FIRST_PLAIN_STEPS):
        take(model, 1, 1, 1.0)
    for _ in range(5):
        for _ in range(DRAFTED_IN_A_ROW - 1):
            take(model, 1, 4, 1.7)
        assert not plain_due(model, 1)
        take(model, 1, 1, 1.0)
    assert plain_due(model, 4), "but for so many sequences nothing was seen yet"
    assert not plain_due(model, 1)


def test_more_rows_than_allowed_are_no_error() -> None:
    model = StepTimeModel(CURVE, 10)
    take(model, 1, 99, 4.6)
    assert seconds_at(model, 1, 10) == pytest.approx(4.6)
