"""Cool-downs: pauses end, double while nothing pays, and are short again once something has."""

from __future__ import annotations

from model.planning.cool_down import FIRST_PAUSE, LONGEST_PAUSE, CoolDown


def steps_of_pause(cool_down: CoolDown) -> int:
    steps = 1
    while not cool_down.tick():
        assert cool_down.active
        steps += 1
    return steps


def test_without_a_pause_nothing_ends() -> None:
    cool_down = CoolDown()
    assert not cool_down.active
    assert not any(cool_down.tick() for _ in range(3 * LONGEST_PAUSE))
    assert cool_down.remaining == 0


def test_a_pause_ends_once() -> None:
    cool_down = CoolDown()
    cool_down.start()
    assert cool_down.active and cool_down.remaining == FIRST_PAUSE
    assert steps_of_pause(cool_down) == FIRST_PAUSE
    assert not cool_down.active and not cool_down.tick()


def test_pauses_double_up_to_the_longest() -> None:
    cool_down = CoolDown()
    lengths = []
    for _ in range(5):
        cool_down.start()
        lengths.append(steps_of_pause(cool_down))
    assert lengths == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_source_that_has_paid_begins_with_a_short_pause() -> None:
    cool_down = CoolDown()
    for _ in range(3):
        cool_down.start()
        steps_of_pause(cool_down)
    cool_down.reset()
    cool_down.start()
    assert steps_of_pause(cool_down) == FIRST_PAUSE


def test_a_new_sequence_begins_where_the_others_are() -> None:
    shared = CoolDown()
    first = CoolDown(shared)
    first.start()
    for _ in range(10):
        shared.tick()
    second = CoolDown(shared)
    assert steps_of_pause(second) == FIRST_PAUSE - 10
    second.start()
    assert shared.remaining == 2 * FIRST_PAUSE, "it goes on losing"
    assert CoolDown().remaining == 0
    steps_of_pause(first)
    first.reset()
    assert not shared.active and CoolDown(shared).next_pause == FIRST_PAUSE
