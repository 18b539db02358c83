"""Plans: the text is exact whatever is drafted; the live plan earns with good drafts and loses little with bad ones.

The speed of the live plan is tried in simulation: times are those of a curve, right guesses come by chance.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from fake_base import FakeBase
from test_step import Oracle, plain

from model.decoding.drafting import ConstantDrafter
from model.decoding.live import LivePlan
from model.decoding.ngram import NgramIndex
from model.decoding.planning import FixedPlan, Plan, Proposal
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.slot import Slot
from model.decoding.step import _with_branch, prefill, step
from model.trees.costs import CostCurve
from model.trees.search import best_tree, grow
from model.trees.tree import Tree

BF16 = ((1, 1.0), (2, 1.19), (3, 1.38), (4, 1.57), (6, 1.88), (8, 2.12), (12, 2.5), (16, 2.89))  # shared figures
Q4_0 = ((1, 1.0), (2, 1.63), (3, 2.26), (4, 1.7), (6, 2.96), (8, 2.98), (12, 4.1), (16, 4.61))
Q4_K_M = ((1, 1.0), (2, 1.6), (3, 2.12), (4, 2.67), (6, 3.78), (8, 4.32), (12, 5.47), (16, 5.42))
GOOD = np.array([[0.75, 0.1, 0.04], [0.6, 0.12, 0.05], [0.5, 0.12, 0.05], [0.45, 0.1, 0.05]])
DRAFT_S = 0.05


def curve(times: tuple[tuple[int, float], ...]) -> CostCurve:
    return CostCurve((0,), tuple(n for n, _ in times), (tuple(t for _, t in times),))


def live(
    times: tuple[tuple[int, float], ...], *, heads: bool = True, branch: int = 0, most_rows: int = 512
) -> LivePlan:
    if not heads:
        return LivePlan(curve(times), branch=branch)
    paths, draft_s = grow(GOOD, 15), [DRAFT_S] * len(GOOD)
    return LivePlan(curve(times), paths=paths, accuracies=GOOD, draft_s=draft_s, branch=branch, most_rows=most_rows)


class Looping(FakeBase):
    """A fake model whose text goes in circles: its logits hang on the last token alone."""

    def logits_of(self, history: list[int]) -> npt.NDArray[np.float32]:
        return super().logits_of(history[-1:])


@pytest.mark.parametrize("make", [FakeBase, Looping])
@pytest.mark.parametrize("kind", ["live", "fixed", "branch"])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.5, seed=3)], ids=repr)
def test_text_is_the_plain_text(make: type[FakeBase], kind: str, params: SamplingParams) -> None:
    tree = Tree(grow(GOOD, 7))
    plan: Plan = live(BF16, branch=7)
    if kind != "live":
        plan = FixedPlan(tree if kind == "fixed" else Tree([]), 7)
    base = make(n_seq_max=plan.lanes)
    slot = Slot([1, 2, 3], 123, Sampler(params), lambda t: False, lanes=range(plan.lanes))
    slot.ngrams = NgramIndex(slot.tokens)
    if kind != "branch":
        slot.drafter = Oracle(base, slot, Tree(grow(GOOD, 15)), 0.4)
    prefill(base, slot)
    while not slot.finished:
        step(base, [slot], plan)
        for lane in slot.lanes:
            assert base.text_of(lane) == slot.tokens[:-1], "every lane holds the committed text and nothing else"
    assert slot.tokens == plain(base, [1, 2, 3], 120, params)
    if make is Looping and not params.temperature:
        assert slot.stats.branch_accepted > 20, "branches must have been accepted, or nothing was tested"


def test_a_branch_leaves_the_tree_where_the_two_part() -> None:
    tree = Tree([(0,), (1,), (0, 0)])
    tokens = [9, 5, 6, 7]  # root; its children 5 and 6; 7 under 5
    joined = _with_branch(Proposal(tree, [5, 7, 1, 2, 3], 2), tokens)
    assert tokens == [9, 5, 6, 7, 1, 2] and joined.parents.tolist() == [-1, 0, 0, 1, 3, 4]
    tokens = [9, 5, 6, 7]
    joined = _with_branch(Proposal(tree, [6, 8], 2), tokens)
    assert tokens == [9, 5, 6, 7, 8] and joined.parents.tolist() == [-1, 0, 0, 1, 2]
    tokens = [9, 5, 6, 7]
    assert _with_branch(Proposal(tree, [4, 4], 1), tokens).parents.tolist() == [-1, 0, 0, 1, 0] and tokens[-1] == 4
    assert _with_branch(Proposal(tree, [5, 7], 4), [9, 5, 6, 7]) is tree
    assert len(joined.leaves) <= FixedPlan(tree, 2).lanes


class World:
    """Simulated decoding: true rates of guesses, a curve, noise on the clock. dearer: passes with drafts, secretly."""

    def __init__(
        self, times: tuple[tuple[int, float], ...], rates: npt.NDArray[np.float64], seed: int = 0, dearer: float = 1.0
    ) -> None:
        self.curve, self.rates, self.rng, self.dearer = curve(times), rates, np.random.default_rng(seed), dearer

    def run(self, plan: Plan, n: int, *slots: Slot) -> float:
        """Return the speed in multiples of plain decoding's, over n passes' worth of plain tokens."""
        slots = slots or (drafted_slot(),)
        spent, start = 0.0, [len(slot.tokens) for slot in slots]
        for slot in slots:
            slot.hidden = np.zeros((1, 4), np.float32)
        while (won := sum(len(slot.tokens) for slot in slots) - sum(start)) < n * len(slots):
            proposals = plan.propose_all(slots)
            walks = [self._walk(proposal.tree, slot) for proposal, slot in zip(proposals, slots, strict=True)]
            rows, states = sum(len(p.tree) for p in proposals), sum(len(p.tree) > 1 for p in proposals)
            took = self.curve.seconds_for(rows, 0) * float(self.rng.lognormal(0, 0.05))
            took *= self.dearer if states else 1.0
            spent += took + (DRAFT_S * (0.9 + 0.1 * states) if states else 0)
            for slot, proposal, (tokens, truth) in zip(slots, proposals, walks, strict=True):
                slot.tokens += truth
                slot.hidden = np.zeros((1, 4), np.float32) if plan.wants_state(slot) else None
                plan.learn(slot, proposal, tokens, truth, rows, took)
        return won / spent * self.curve.seconds_for(len(slots), 0) / len(slots)

    def _walk(self, tree: Tree, slot: Slot) -> tuple[list[int], list[int]]:
        """Return the tree's tokens and those won: which child, if any, is right?"""
        truth, tokens, node = list[int](), [0] + [-1] * (len(tree) - 1), 0
        while True:
            depth = len(truth)
            draw, right = self.rng.random(), 0
            for child in tree.children[node]:
                draw -= self.rates[depth, tree.ranks[child]] if depth < len(self.rates) else 1
                if draw < 0:
                    right = child
                    break
            truth.append(100 + len(slot.tokens) + depth)
            if not right:
                return tokens, truth
            tokens[right] = truth[-1]
            node = right


def drafted_slot() -> Slot:
    return Slot([0], 10**9, Sampler(SamplingParams()), lambda t: False, ConstantDrafter(0))


@pytest.mark.parametrize("times", [BF16, Q4_0, Q4_K_M], ids=["BF16", "Q4_0", "Q4_K_M"])
def test_useless_heads_cost_little(times: tuple[tuple[int, float], ...]) -> None:
    speeds = [World(times, 0 * GOOD, seed).run(live(times), 256) for seed in range(12)]
    assert np.median(speeds) >= 0.96, speeds
    fixed = World(times, 0 * GOOD).run(FixedPlan(Tree(grow(GOOD, 3))), 256)
    assert fixed < 0.8, "the control: without the guard they are dear"


@pytest.mark.parametrize("times", [BF16, Q4_0, Q4_K_M], ids=["BF16", "Q4_0", "Q4_K_M"])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_good_heads_earn_what_the_best_fixed_tree_earns(times: tuple[tuple[int, float], ...], share: float) -> None:
    rates = share * GOOD
    best = best_tree(rates, curve(times).on_offer(0, 16), draft_seconds=DRAFT_S, max_nodes=16)
    speeds = [World(times, rates, seed).run(live(times), 512) for seed in range(8)]
    fixed = [World(times, rates, seed).run(FixedPlan(best.tree), 512) for seed in range(8)]
    assert np.mean(speeds) >= 0.94 * np.mean(fixed), (speeds, fixed, best)
    assert np.mean(fixed) == pytest.approx(best.speedup, rel=0.05), "the simulation agrees with the search"


def test_drafting_stops_where_the_text_turns_and_starts_again() -> None:
    world = World(BF16, GOOD)
    plan = live(BF16)
    slot = drafted_slot()
    first = world.run(plan, 300, slot)
    world.rates = 0 * GOOD
    world.run(plan, 100, slot)
    bad = world.run(plan, 300, slot)
    world.rates = GOOD
    world.run(plan, 600, slot)
    again = world.run(plan, 300, slot)
    assert first > 1.4 and bad > 0.94 and again > 0.9 * first


def test_branches_rest_where_the_text_so_far_says_nothing_about_what_follows() -> None:
    rng = np.random.default_rng(0)
    base = FakeBase(n_vocab=6)  # six tokens at random: matches everywhere, and none of them means anything
    plan = live(Q4_K_M, heads=False, branch=7)
    slot = Slot(rng.integers(0, 6, 50).tolist(), 450, Sampler(SamplingParams(2.0)), lambda t: False)
    slot.ngrams = NgramIndex(slot.tokens)
    prefill(base, slot)
    rows = []
    while not slot.finished:
        before = sum(slot.stats.drafted)
        step(base, [slot], plan)
        rows.append(sum(slot.stats.drafted) - before)
    assert sum(rows) < 120 and sum(rows[-100:]) < 20


def test_a_tree_pays_for_its_depth() -> None:
    def first_tree(draft_s: list[float]) -> Tree:
        plan = LivePlan(curve(BF16), paths=grow(GOOD, 15), accuracies=GOOD, draft_s=draft_s)
        slot = drafted_slot()
        for _ in range(3):  # plain steps come first
            tree = plan.propose(slot).tree
            plan.clock.note(len(tree), plan.clock.curve.seconds_for(len(tree), 0))
            slot.hidden = np.zeros((1, 1), np.float32)
        return tree

    level, steep = [0.1] * 4, [0.1, 0.4, 0.7, 1.0]
    for draft_s in (level, steep):
        rates = best_tree(GOOD, curve(BF16).on_offer(0, 16), draft_seconds=draft_s, max_nodes=16)
        assert first_tree(draft_s).max_depth == rates.tree.max_depth
    assert first_tree(steep).max_depth < first_tree(level).max_depth


def test_states_are_wanted_only_while_heads_draft() -> None:
    plan = live(Q4_K_M, heads=True)
    slot = drafted_slot()
    assert plan.wants_state(slot)
    World(Q4_K_M, 0 * GOOD).run(plan, 64, slot)
    assert slot.live is not None and slot.live.rests[0] > 1 and not plan.wants_state(slot)


LONG = (*BF16, (32, 5.5))


@pytest.mark.parametrize("slots", [4, 16])
@pytest.mark.parametrize("rates", [0 * GOOD, GOOD], ids=["useless", "good"])
@pytest.mark.parametrize("dearer", [1.0, 1.4])
def test_many_texts_are_never_slower_for_it(slots: int, rates: npt.NDArray[np.float64], dearer: float) -> None:
    """Useless heads, a full load, passes with drafts that take longer than the curve says: nothing costs much."""
    speeds = [
        World(LONG, rates, seed, dearer).run(live(LONG), 256, *(drafted_slot() for _ in range(slots)))
        for seed in range(3)
    ]
    assert np.median(speeds) >= 0.96, speeds
    if slots == 4 and rates.any() and dearer == 1.0:
        assert np.median(speeds) > 1.15, "there drafts pay"
    fixed = World(LONG, rates, 0, dearer).run(FixedPlan(Tree(grow(GOOD, 7))), 64, *(drafted_slot() for _ in range(16)))
    assert fixed < 0.96, "the control: a tree for everyone is dear"
