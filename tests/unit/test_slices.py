"""Measurements in slices: what was disturbed is measured again, the result is the same."""

from __future__ import annotations

import pytest

from model.trees.costs import curve_in_slices, measure_curve
from model.trees.slices import Slices, finish, undisturbed


def test_a_slice_is_run_again_until_nothing_disturbs_it() -> None:
    runs = iter(range(10))
    slices = undisturbed(lambda: next(runs))
    next(slices)
    slices.send(True)
    slices.send(True)
    with pytest.raises(StopIteration) as done:
        slices.send(False)
    assert done.value.value == 2, "the third run is the one that counts"


def test_all_slices_at_once() -> None:
    def three() -> Slices[list[int]]:
        found = list[int]()
        for n in (1, 2, 3):
            found.append((yield from undisturbed(lambda n=n: n)))  # type: ignore[misc]
        return found

    assert finish(three()) == [1, 2, 3]


class Machine:
    """Batches take a second and a tenth per token; while somebody disturbs, seven times that."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy = False

    def run(self, n: int, context: int) -> float:
        seconds = 1 + n / 10
        if self.busy:
            seconds *= 7 if n == 1 else 50
        self.now += seconds
        return seconds

    def slices(self) -> Slices[object]:
        clock = lambda: self.now  # noqa: E731
        return curve_in_slices(self.run, (1, 2, 4), (0, 9), budget_s=0.0, clock=clock)


def test_a_disturbed_curve_is_the_curve_of_a_quiet_machine() -> None:
    quiet = measure_curve(Machine().run, (1, 2, 4), (0, 9), budget_s=0.0)
    for told in (True, False):
        machine = Machine()
        slices = machine.slices()
        n = 0
        found: object = None
        try:
            machine.busy = True  # in the first slice, and in every other one
            next(slices)
            while True:
                disturbed = machine.busy
                n += 1
                machine.busy = n % 2 == 0
                slices.send(disturbed and told)
        except StopIteration as done:
            found = done.value
        assert (found == quiet) == told, "the control: where nobody tells, it is spoiled"
