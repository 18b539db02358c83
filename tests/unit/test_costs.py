"""The cost curve: exact on lines, robust against spikes, and a damaged one is never trusted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model.trees.costs import SIZES, CostCurve, measure_curve

CURVE = CostCurve((100, 300), (1, 2, 3, 4), ((1.0, 1.6, 2.3, 1.6), (2.0, 2.6, 3.3, 3.6)))


def line(n: float, context: float) -> float:
    """Bilinear, so that interpolation must return it exactly."""
    return 0.5 + 0.25 * n + 0.001 * context + 0.0005 * n * context


class Machine:
    """A clock and a `run` that moves it.

    `extra(k, n, context)` is added to the k-th batch (from 0).
    """

    def __init__(
        self,
        extra: Callable[[int, int, int], float] = lambda k, n, context: 0.0,
        switch_s: float = 0,
    ) -> None:
        self.now = 1000.0
        self.calls = list[tuple[int, int]]()
        self.extra = extra
        self.switch_s = switch_s

    def clock(self) -> float:
        return self.now

    def run(self, n: int, context: int) -> float:
        if not self.calls or self.calls[-1][1] != context:
            self.now += self.switch_s
        seconds = line(n, context) + self.extra(len(self.calls), n, context)
        self.calls.append((n, context))
        self.now += seconds
        return seconds

    def measure(
        self, sizes: tuple[int, ...], contexts: tuple[int, ...], budget_s: float
    ) -> CostCurve:
        return measure_curve(self.run, sizes, contexts, budget_s=budget_s, clock=self.clock)


def test_interpolation_is_exact_on_lines() -> None:
    curve = CostCurve(
        (64, 256, 1024),
        (1, 4, 16),
        tuple(tuple(line(n, c) for n in (1, 4, 16)) for c in (64, 256, 1024)),
    )
    for context in (64, 100.5, 256, 700, 1024, 4000):
        for n in (1, 1.5, 2, 4, 9, 16, 40):
            assert curve.seconds_for(n, context) == pytest.approx(line(n, context), rel=1e-12)
        row = [line(n, context) for n in range(1, 41)]
        np.testing.assert_allclose(curve.row(context, 40), row, rtol=1e-12)
        assert curve.ratio(4, context) == pytest.approx(
            line(4, context) / line(1, context), rel=1e-12
        )


def test_the_dip_at_four_is_kept() -> None:
    assert CURVE.row(100, 4).tolist() == [1.0, 1.6, 2.3, 1.6]
    assert CURVE.seconds_for(3.5, 100) == pytest.approx(1.95)
    assert CURVE.seconds_for(2.5, 200) == pytest.approx(2.45)
    assert CURVE.ratio(4, 300) == 1.8


def test_below_the_first_it_is_level() -> None:
    assert CURVE.seconds_for(0.5, 100) == 1.0 and CURVE.seconds_for(2, 0) == 1.6
    assert CURVE.row(0, 4).tolist() == CURVE.row(100, 4).tolist()


def test_beyond_the_last_the_last_slope_goes_on() -> None:
    assert CURVE.seconds_for(6, 300) == pytest.approx(4.2)  # 0.3 a token
    assert CURVE.seconds_for(1, 500) == pytest.approx(3.0)  # 1 s per 200 cached tokens
    assert CURVE.row(300, 6)[-1] == pytest.approx(4.2) and CURVE.row(500, 6).shape == (6,)


def test_beyond_the_last_nothing_falls() -> None:
    assert CURVE.seconds_for(1000, 100) == 1.6  # falls from 3 to 4
    falling = CostCurve((100, 300), (1, 2), ((2.0, 3.0), (1.0, 3.5)))
    assert falling.seconds_for(1, 10_000) == 1.0 and falling.seconds_for(1, 200) == 1.5
    assert falling.row(500, 2).tolist() == [1.0, 4.0]


def test_one_context_holds_for_all() -> None:
    single = CostCurve((128,), (1, 2), ((1.0, 1.5),))
    assert single.seconds_for(2, 0) == single.seconds_for(2, 9999) == 1.5
    assert single.row(9999, 3).tolist() == [
        1.0,
        1.5,
        2,
    ]


def test_a_row_is_the_callers_own() -> None:
    for context in (0, 100, 200, 300, 999):
        row = CURVE.row(context, 4)
        before = row.copy()
        row[:] = -1.0
        assert CURVE.row(context, 4).tolist() == before.tolist()


def test_rounds_alternate_and_contexts_come_one_after_another() -> None:
    machine = Machine()
    curve = machine.measure(
        (1, 2, 4), (10, 90), 0.01 + 2 * 3 * sum(line(n, 90) for n in (1, 2, 1, 4))
    )
    there = [1, 2, 1, 4]
    back = [1, 4, 1, 2]
    assert machine.calls[:12] == [(n, 10) for n in there + back + there]
    at = next(i for i, (_, context) in enumerate(machine.calls) if context == 90)
    assert at % 4 == 0 and {context for _, context in machine.calls[at:]} == {90}
    assert machine.calls[at:] == [(n, 90) for n in there + back + there]
    assert (curve.contexts, curve.sizes) == ((10, 90), (1, 2, 4))
    np.testing.assert_allclose(
        curve.seconds, [[line(n, c) for n in (1, 2, 4)] for c in (10, 90)], rtol=1e-12
    )


def test_spikes_do_not_reach_the_curve() -> None:
    # Every seventh batch, whatever its size.
    machine = Machine(lambda k, n, context: 50.0 if k % 7 == 3 else 0.0)
    curve = machine.measure((1, 2, 3, 4, 8), (0,), 800.0)
    np.testing.assert_allclose(curve.seconds[0], [line(n, 0) for n in (1, 2, 3, 4, 8)], rtol=1e-12)
    hit = {machine.calls[k][0] for k in range(3, len(machine.calls), 7)}
    assert hit == {1, 2, 3, 4, 8}  # a mean would be wrong everywhere


def test_a_machine_that_is_slow_for_a_while_moves_no_ratio() -> None:
    # Twice as slow in two of four rounds.
    slow = Machine(lambda k, n, context: line(n, 0) if 8 <= k < 20 else 0.0)
    curve = slow.measure(
        (1, 2, 3, 4, 8), (0,), 4.5 * sum(line(n, 0) for n in (1, 2, 1, 3, 1, 4, 1, 8))
    )
    assert len(slow.calls) == 24  # the slow one fills the budget sooner
    for n in (2, 3, 4, 8):
        assert curve.ratio(n, 0) == pytest.approx(line(n, 0) / line(1, 0), rel=1e-12)
    twos = [line(n, 0) * (2 if 8 <= k < 20 else 1) for k, (n, _) in enumerate(slow.calls) if n == 2]
    assert sorted(twos)[1] == 2 * line(2, 0), "the median of the plain times is wrong"


def test_three_rounds_drop_one_spike_and_more_rounds_fill_the_budget() -> None:
    spike = Machine(lambda k, n, context: 9.0 if k == 1 else 0.0)
    round_s = line(1, 0) + line(2, 0)
    assert spike.measure((1, 2), (0,), 9 + round_s + 0.01).seconds[0] == pytest.approx(
        (line(1, 0), line(2, 0))
    )
    assert len(spike.calls) == 6
    for fit in (3, 4, 11):
        long = Machine()
        long.measure((1, 2), (0,), (fit + 0.5) * round_s)
        assert Counter(long.calls) == {(1, 0): fit, (2, 0): fit}


def test_three_rounds_are_made_whatever_they_take() -> None:
    """A stall in the only round would be believed."""
    machine = Machine(extra=lambda k, n, context: 50.0 if k == 0 else 0.0)
    curve = machine.measure((1, 2), (0, 10), 0.1)
    assert Counter(machine.calls) == {(n, c): 3 for n in (1, 2) for c in (0, 10)}
    np.testing.assert_allclose(
        curve.seconds, [[line(1, c), line(2, c)] for c in (0, 10)], rtol=1e-12
    )


def test_a_long_prefill_costs_no_context_its_median() -> None:
    machine = Machine(switch_s=100.0)
    machine.measure((1, 2), (0, 10), 6.0)  # a round fits, the prefill does not
    assert Counter(machine.calls) == {(n, c): 3 for n in (1, 2) for c in (0, 10)}
    machine = Machine(switch_s=5.0)
    machine.measure((1, 2), (0,), 5 + 4.5 * (line(1, 0) + line(2, 0)))
    assert len(machine.calls) == 8  # the prefill counts: 4 rounds are left


@pytest.mark.parametrize(
    ("sizes", "contexts"), [((1, 4, 2), (0,)), ((), (0,)), ((1, 2), ()), ((1, 2), (9, 9))]
)
def test_unsorted_sizes_are_a_mistake_before_anything_is_timed(
    sizes: tuple[int, ...], contexts: tuple[int, ...]
) -> None:
    machine = Machine()
    with pytest.raises(AssertionError, match="sizes"):
        machine.measure(sizes, contexts, 1.0)
    assert machine.calls == []


def test_the_sizes_measured_by_default_show_a_kernel_at_multiples_of_four() -> None:
    assert SIZES[:8] == (1, 2, 3, 4, 5, 6, 7, 8)
    assert SIZES[-1] == 64
    assert sorted(set(SIZES)) == list(SIZES)


def test_json_round_trip() -> None:
    curve = Machine().measure(SIZES, (0, 777), 0.0)
    again = CostCurve.from_json(json.loads(json.dumps(curve.to_json())))
    assert again == curve and hash(again) == hash(curve)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda d: None,
    "a list": lambda d: [d],
    "a number": lambda d: 3,
    "empty": lambda d: {},
    "a key gone": lambda d: {k: v for k, v in d.items() if k != "sizes"},
    "a key more": lambda d: d | {"version": 2},
    "contexts a number": lambda d: d | {"contexts": 100},
    "contexts empty": lambda d: d | {"contexts": [], "seconds": []},
    "a context negative": lambda d: d | {"contexts": [-1, 300]},
    "contexts unsorted": lambda d: d | {"contexts": [300, 100]},
    "contexts equal": lambda d: d | {"contexts": [100, 100]},
    "a context a fraction": lambda d: d | {"contexts": [100, 300.5]},
    "a context gone": lambda d: d | {"contexts": [100]},
    "sizes text": lambda d: d | {"sizes": "1234"},
    "a size text": lambda d: d | {"sizes": [1, 2, 3, "4"]},
    "a size true": lambda d: d | {"sizes": [True, 2, 3, 4]},
    "sizes unsorted": lambda d: d | {"sizes": [1, 3, 2, 4]},
    "sizes equal": lambda d: d | {"sizes": [1, 2, 2, 4]},
    "sizes not from 1": lambda d: d | {"sizes": [2, 3, 4, 5]},
    "sizes huge": lambda d: d | {"sizes": [1, 2, 3, 10**400]},
    "a size gone": lambda d: d | {"sizes": [1, 2, 3]},
    "one size": lambda d: d | {"sizes": [1], "seconds": [[1.0], [2.0]]},
    "seconds none": lambda d: d | {"seconds": None},
    "a row gone": lambda d: d | {"seconds": d["seconds"][:1]},
    "a row short": lambda d: d | {"seconds": [d["seconds"][0], d["seconds"][1][:3]]},
    "a row a number": lambda d: d | {"seconds": [d["seconds"][0], 2.0]},
    "a row text": lambda d: d | {"seconds": [d["seconds"][0], "1234"]},
}
BAD_TIMES = [
    0,
    0.0,
    -1.0,
    float("nan"),
    float("inf"),
    float("-inf"),
    "2.6",
    None,
    True,
    [2.6],
    10**400,
]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_curve_is_refused(damage: Callable[[dict[str, Any]], Any]) -> None:
    sound = CURVE.to_json()
    assert CostCurve.from_json(sound) == CURVE
    assert CostCurve.from_json(damage(sound)) is None


@pytest.mark.parametrize("bad", BAD_TIMES, ids=lambda bad: f"{bad!r:.6}")
def test_a_time_that_is_none_is_refused(bad: Any) -> None:
    data = CURVE.to_json()
    data["seconds"][1][1] = bad
    assert CostCurve.from_json(data) is None


def test_whole_seconds_are_no_damage() -> None:
    data = {"contexts": [0], "sizes": [1, 2], "seconds": [[1, 2]]}
    assert CostCurve.from_json(data) == CostCurve((0,), (1, 2), ((1.0, 2.0),))
