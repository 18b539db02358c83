"""Tree growth: the nodes that pay, best first, held against a search of all trees."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from model.decoding.drafters.drafter import HEADS, Guesses
from model.planning.acceptance_rate import AGREEING, DISAGREEING, Calibration
from model.planning.tree_growth import MIN_SPEEDUP, Growth, Limits, Source, grow

Guessed = Mapping[tuple[int, ...], list[tuple[int, float]]]  # tokens and probabilities by path
WIDE = Limits(nodes=16, leaves=16)
STEPS = [round(0.05 * i, 2) for i in range(21)]  # kinds: probabilities in steps of 0.05


class Table:
    """A continuation drafter that looks paths up: guesses (token, probability) behind each."""

    learns = False

    def __init__(self, name: str, table: Guessed) -> None:
        self.name = name
        self._table = table

    def start(self) -> tuple[int, ...]:
        return ()

    def advance(self, cursor: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*cursor, token)

    def guesses(self, cursor: tuple[int, ...]) -> Guesses:
        return [(token, round(p / 0.05)) for token, p in self._table.get(cursor, [])]

    def observe(self, *_: object) -> None:
        pass


class Sure(Calibration):
    """Rates that are known for certain, and the same whatever other sources say."""

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__(rates)
        for i, rate in enumerate(self.rates):
            rate.tries = 1e15
            rate.accepted = rates[i // 3] * 1e15


def source(table: Guessed, name: str = "table") -> Source:
    return Source(Table(name, table), Sure(STEPS).of_sequence())


def growth(*sources: Source, room: int = 99) -> Growth:
    return Growth(7, sources, Sure(STEPS).of_sequence(), room)


def random_table(rng: np.random.Generator, depth: int) -> Guessed:
    table: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    level: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        further = []
        for path in level:
            shares = rng.choice(STEPS[1:14], 2, replace=False)
            shares = shares / max(1.0, shares.sum())
            table[path] = [
                (token, round(0.05 * round(p / 0.05), 2)) for token, p in enumerate(shares)
            ]
            further += [(*path, 0), (*path, 1)]
        level = further
    return table


def best_by_search(
    tables: Sequence[Guessed],
    seconds: dict[int, float],
    plain_rate: float,
) -> float:
    """The most tokens per second of all sets of nodes that are closed under parents."""
    nodes = [
        (i, (*path, token))
        for i, table in enumerate(tables)
        for path in table
        for token, _ in table[path]
    ]

    def probability(i: int, path: tuple[int, ...]) -> float:
        p = 1.0
        for depth, token in enumerate(path):
            p *= dict(tables[i][path[:depth]])[token]
        return p

    best = MIN_SPEEDUP * plain_rate
    n = len(tables)
    for size in range(1, max(seconds) - n + 1):
        if n + size not in seconds:
            continue
        for chosen in itertools.combinations(nodes, size):
            inside = set(chosen)
            if all(len(path) == 1 or (i, path[:-1]) in inside for i, path in chosen):
                tokens = n + sum(probability(i, path) for i, path in chosen)
                best = max(best, tokens / seconds[n + size])
    return best if best > MIN_SPEEDUP * plain_rate else plain_rate


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("n", [1, 2])
def test_no_tree_earns_more(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [random_table(rng, 3 - n + 1) for _ in range(n)]
    sizes = [size for size in range(n + 1, n + 6) if rng.random() < 0.7] or [n + 1]
    times = n**0.5 + np.cumsum(rng.random(6)) * rng.choice([0.1, 0.5, 0.9])
    seconds = {size: float(times[size - n]) for size in sizes}
    growths = [growth(source(table)) for table in tables]
    plain_rate = n / n**0.5
    rate = grow(growths, sorted(seconds.items()), plain_rate, WIDE)
    assert rate == pytest.approx(best_by_search(tables, seconds, plain_rate))

    # What it says is what its draft is worth.
    drafts = [each.draft() for each in growths]
    rows = sum(len(draft.tree) for draft in drafts)
    if rows > n:
        tokens = n + sum(node.p for each in growths for node in each.nodes)
        assert tokens / seconds[rows] == pytest.approx(rate)


def test_nothing_is_drafted_where_nothing_pays() -> None:
    chain = {(0,) * depth: [(0, 0.3)] for depth in range(4)}
    one = growth(source(chain))
    assert grow([one], [(2, 1.6), (4, 2.2)], 1.0, WIDE) == 1.0
    assert one.draft().tokens == [7] and one.draft().sources == ()


def test_sources_share_a_tree_and_a_node_belongs_to_the_surer_one() -> None:
    first = source({(): [(1, 0.5)], (1,): [(2, 0.9)]}, "first")
    second = source({(): [(1, 0.8), (3, 0.1)], (1,): [(4, 0.1)], (1, 2): [(5, 0.9)]}, "second")
    one = growth(first, second)
    grow([one], [(n, 1 + 0.01 * n) for n in range(2, 7)], 1.0, WIDE)
    draft = one.draft()
    assert draft.tokens == [7, 1, 2, 5, 3, 4]
    assert draft.tree.parents.tolist() == [-1, 0, 1, 2, 0, 1]
    assert draft.sources == ["second", "first", "second", "second", "second"]


def test_what_the_heads_say_joins_the_tree_and_costs_what_it_costs() -> None:
    offers = [(n, 1 + 0.2 * (n - 1)) for n in range(2, 7)]
    table: Guessed = {(): [(1, 0.5)], (1, 2): [(3, 0.9)]}
    one = growth(source(table))
    before = grow([one], offers, 1.0, WIDE)
    one.add_look(one.root, [(1, 18), (4, 2)])  # 0.9 and 0.1
    [child] = one.nodes
    one.add_look(child, [(2, 16)])
    after = grow([one], offers, 1.0, WIDE, 0.1)
    draft = one.draft()
    assert draft.tokens == [7, 1, 2, 3] and draft.filled_depth == 2
    assert draft.sources == [HEADS, HEADS, "table"]
    assert after == pytest.approx((1 + 0.9 + 0.9 * 0.8 + 0.9 * 0.8 * 0.9) / (1.6 + 0.1))
    assert after > before == pytest.approx(1.5 / 1.2)
    dear = grow([one], offers, 1.0, WIDE, 99.0)
    assert dear < 0.05, "what is spent is spent, with nodes or without"


def test_no_tree_goes_beyond_its_limits() -> None:
    wide: Guessed = {(): [(token, 0.1) for token in range(9)]}
    offers = [(n, 1 + 1e-6 * n) for n in range(2, 20)]
    one = growth(source(wide))
    grow([one], offers, 1.0, Limits(nodes=16, leaves=4))
    assert len(one.draft().tree.leaves) == 4
    deep = {(0,) * depth: [(0, 0.95)] for depth in range(30)}
    one = growth(source(deep))
    grow([one], offers, 1.0, Limits(nodes=5, leaves=4))
    assert one.draft().tree.max_depth == 5
    one = growth(source(deep), room=3)
    grow([one], offers, 1.0, WIDE)
    assert one.draft().tree.max_depth == 3, "what lies behind the sequence's end is of no use"
    one = growth(source(deep), room=0)
    grow([one], offers, 1.0, WIDE)
    assert len(one.draft().tree) == 1


def test_a_step_has_only_sizes_that_are_on_offer() -> None:
    deep = {(0,) * depth: [(0, 0.9)] for depth in range(30)}
    one = growth(source(deep))
    grow([one], [(4, 1.2), (8, 9.0)], 1.0, WIDE)
    assert len(one.draft().tree) == 4


def learning(table: Guessed) -> Source:
    return Source(Table("table", table), Calibration(STEPS).of_sequence())


def test_rates_are_learnt_from_what_was_not_drafted_too() -> None:
    table = learning({(): [(1, 0.3), (2, 0.3)], (1,): [(5, 0.3)]})
    one = growth(table)
    grow([one], [(2, 9.0)], 1.0, WIDE)
    assert len(one.draft().tree) == 1
    before = table.calibration.probability(18)
    for _ in range(20):
        one.learn(0, [9])
    assert table.calibration.probability(18) < before / 2


def test_rates_are_learnt_along_the_accepted_path() -> None:
    table = learning({(): [(1, 0.9)], (1,): [(5, 0.7)], (1, 5): [(6, 0.5)]})
    one = growth(table)
    grow([one], [(n, 1.0 + 0.01 * n) for n in (2, 3, 4)], 1.0, WIDE)
    assert one.draft().tokens == [7, 1, 5, 6]
    before = [table.calibration.probability(3 * kind) for kind in (18, 14, 10)]
    for _ in range(10):
        one.learn(2, [1, 5, 8])  # 6 was rejected
    after = [table.calibration.probability(3 * kind) for kind in (18, 14, 10)]
    assert after[0] > before[0] and after[1] > before[1] and after[2] < before[2] / 1.5


def test_kinds_tell_agreement_and_disagreement_apart() -> None:
    first = learning({(): [(1, 0.5)]})
    second = learning({(): [(1, 0.5)]})
    third = learning({(): [(2, 0.5)]})
    for sources, kinds in (
        ([first], {30}),
        ([first, second], {31}),
        ([first, third], {32}),
        ([first, second, third], {31, 32}),
    ):
        one = growth(*sources)
        one.expand(one.root)
        assert {kind for _, kind, _ in one.root.judged} == kinds
    one = growth(first)
    one.add_look(one.root, [(1, 4), (3, 2)])
    assert [kind for _, kind, _ in one.root.judged] == [30, 3 * 4 + AGREEING, 3 * 2 + DISAGREEING]
