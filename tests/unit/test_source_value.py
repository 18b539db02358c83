"""The value of a source: what does not pay pauses, longer each time, and is tried again."""

from __future__ import annotations

from model.planning import source_value
from model.planning.source_value import TRIAL, SourceValue

FIRST_PAUSE = source_value.FIRST_PAUSE * TRIAL
LONGEST_PAUSE = source_value.LONGEST_PAUSE * TRIAL


def steps_of_pause(value: SourceValue) -> int:
    steps = 0
    while value.pausing:
        value.tick()
        steps += 1
    return steps


def asked(value: SourceValue, gain: float, n: int = TRIAL) -> None:
    """Ask n times, for a gain of so many tokens each."""
    for _ in range(n):
        value.record(0.0, 0, 0.0, -gain)


def test_looks_that_cost_more_than_they_bring_pause_ever_longer() -> None:
    value = SourceValue()
    pauses = []
    for _ in range(5):
        asked(value, -0.07, TRIAL - 1)
        assert not value.pausing, "not before it is judged"
        asked(value, -0.07, 1)
        pauses.append(steps_of_pause(value))
    assert pauses == [FIRST_PAUSE * 2**i for i in range(5)] and pauses[-1] == LONGEST_PAUSE


def test_a_source_that_pays_is_asked_on_and_its_next_pause_is_short() -> None:
    value = SourceValue()
    asked(value, -0.1)
    steps_of_pause(value)
    asked(value, 0.3, 20 * TRIAL)
    assert not value.pausing
    asked(value, -0.5, 1)
    assert not value.pausing, "one is no rule"
    while not value.pausing:
        asked(value, -0.5, 1)
    assert steps_of_pause(value) == FIRST_PAUSE


def test_few_that_bring_much_outweigh_many_that_bring_nothing() -> None:
    value = SourceValue()
    for _ in range(10):
        asked(value, -0.05, 5)
        asked(value, 0.45, 2)
        asked(value, -0.05, 4)
        assert not value.pausing


def test_a_new_sequence_begins_where_the_others_are() -> None:
    shared = SourceValue()
    asked(SourceValue(shared), -0.1)
    second = SourceValue(shared)
    assert second.remaining == FIRST_PAUSE and second.next_pause == 2 * FIRST_PAUSE
    assert not SourceValue().pausing, "the control"


def test_a_trial_goes_on_over_short_sequences() -> None:
    shared = SourceValue()
    for _ in range(TRIAL // 3):
        asked(SourceValue(shared), -0.1, 3)
    assert shared.remaining == FIRST_PAUSE


def test_hidden_states_are_due_in_time() -> None:
    value = SourceValue()
    assert value.due_soon
    asked(value, -0.1)
    due = []
    for _ in range(FIRST_PAUSE):
        due.append(value.due_soon)
        value.tick()
    assert due.count(True) == 1 and due[-1] and not value.pausing


def test_what_is_promised_and_does_not_come_is_worth_nothing() -> None:
    """Each time a token and a half is expected, for a cost of one."""
    honest = SourceValue()
    boasting = SourceValue()
    for i in range(200):
        if not honest.pausing:
            honest.record(1.5, 1 + i % 2, 0.0, 1.0)
        if not boasting.pausing:
            boasting.record(1.5, i % 2, 0.0, 1.0)
    assert boasting.pausing and not honest.pausing
