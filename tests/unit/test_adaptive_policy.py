"""The adaptive policy: exact whatever is drafted; it earns with good drafts, loses little with bad.

Its speed is tried in simulation (`simulation.py`): times follow a curve, right guesses come by
chance.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import numpy.typing as npt
import pytest
from fake_base import FakeBase
from oracles import Knowing, Oracle, new_sequence, plain, prefill
from simulation import (
    BF16,
    DRAFT_S,
    GOOD,
    LONG,
    Q4_0,
    Q4_K_M,
    ChanceDrafter,
    Times,
    World,
    adaptive,
    curve,
    drafted_sequence,
    heads_source,
)

from model.decoding.draft import NO_DRAFT, ROOT_ONLY, Proposal
from model.decoding.draft_policy import DraftPolicy, FixedPolicy, StepOutcome
from model.decoding.drafters.drafter import HEADS, NGRAM, ConstantDrafter
from model.decoding.drafters.ngram import NgramDrafter
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import Sequence
from model.decoding.step import step
from model.planning.adaptive_policy import AdaptivePolicy
from model.planning.cool_down import FIRST_PAUSE
from model.planning.sources import ContinuationSource, SourceModel, TreeSource
from model.trees.search import best_tree, grow
from model.trees.tree import Tree

GROWN = Tree(grow(GOOD, 15))
CURVES = pytest.mark.parametrize("times", [BF16, Q4_0, Q4_K_M], ids=["BF16", "Q4_0", "Q4_K_M"])


class Looping(FakeBase):
    """A fake model whose output goes in circles: its logits hang on the last token alone."""

    def logits_of(self, history: list[int]) -> npt.NDArray[np.float32]:
        return super().logits_of(history[-1:])


@pytest.mark.parametrize("make", [FakeBase, Looping])
@pytest.mark.parametrize("kind", ["adaptive", "tree and continuation", "continuation"])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.5, seed=3)], ids=repr
)
def test_the_output_is_the_plain_output(
    make: type[FakeBase], kind: str, params: SamplingParams
) -> None:
    policy: DraftPolicy = adaptive(BF16, continuation=7)
    if kind != "adaptive":
        policy = FixedPolicy(ROOT_ONLY if kind == "continuation" else Tree(grow(GOOD, 7)), 7)
    base = make(n_seq_max=policy.max_leaves)
    sequence = new_sequence([1, 2, 3], 120, params)
    sequence.seq_ids = range(policy.max_leaves)
    sequence.continuation_drafters[NGRAM] = NgramDrafter(sequence.tokens)
    if kind != "continuation":
        sequence.tree_drafters[HEADS] = Oracle(base, sequence, GROWN, 0.4)
    prefill(base, sequence)
    while not sequence.finished:
        step(base, [sequence], policy)
        for seq_id in sequence.seq_ids:
            assert base.text_of(seq_id) == sequence.tokens[:-1], "the committed tokens, no more"
    assert sequence.tokens == plain(base, [1, 2, 3], 120, params)
    accepted = sequence.statistics.accepted_by_source
    if kind != "continuation" and make is FakeBase:
        assert accepted[HEADS] > 10, "or nothing was tested"
    if make is Looping and not params.temperature:
        assert accepted[NGRAM] > 20, "or nothing was tested"


# What it earns and loses, one sequence


@CURVES
def test_useless_heads_cost_little(times: Times) -> None:
    speeds = [World(times, 0 * GOOD, seed).run(adaptive(times), 256) for seed in range(12)]
    assert np.median(speeds) >= 0.96, speeds
    fixed = World(times, 0 * GOOD).run(FixedPolicy(Tree(grow(GOOD, 3))), 256)
    assert fixed < 0.8, "the control: without cool-downs they are dear"


@CURVES
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_good_heads_earn_what_the_best_fixed_tree_earns(times: Times, share: float) -> None:
    rates = share * GOOD
    offered = curve(times).on_offer(0, 16)
    best = best_tree(rates, offered, draft_seconds=DRAFT_S, max_nodes=16)
    speeds = [World(times, rates, seed).run(adaptive(times), 512) for seed in range(8)]
    fixed = [World(times, rates, seed).run(FixedPolicy(best.tree), 512) for seed in range(8)]
    assert np.mean(speeds) >= 0.94 * np.mean(fixed), (speeds, fixed, best)
    assert np.mean(fixed) == pytest.approx(best.speedup, rel=0.05), "the world is the search's"


def test_drafting_stops_where_the_sequence_turns_and_starts_again() -> None:
    world = World(BF16, GOOD)
    policy = adaptive(BF16)
    sequence = drafted_sequence()
    first = world.run(policy, 300, sequence)
    world.rates = 0 * GOOD
    world.run(policy, 100, sequence)
    bad = world.run(policy, 300, sequence)
    world.rates = GOOD
    world.run(policy, 600, sequence)
    again = world.run(policy, 300, sequence)
    assert first > 1.4 and bad > 0.94 and again > 0.9 * first, (first, bad, again)


def test_a_tree_pays_for_its_depth() -> None:
    def first_tree(draft_seconds: list[float]) -> Tree:
        policy = AdaptivePolicy(curve(BF16), [heads_source(draft_seconds)])
        lot = Lot(BF16, 1, policy)
        (proposal,) = policy.propose(lot.sequences)
        return proposal.trees[0].tree

    level = [0.1] * 4
    steep = [0.1, 0.4, 0.7, 1.0]
    for draft_seconds in (level, steep):
        offered = curve(BF16).on_offer(0, 16)
        best = best_tree(GOOD, offered, draft_seconds=draft_seconds, max_nodes=16)
        assert first_tree(draft_seconds).max_depth == best.tree.max_depth
    assert first_tree(steep).max_depth < first_tree(level).max_depth


def test_hidden_states_are_wanted_only_while_heads_draft() -> None:
    policy = adaptive(Q4_K_M)
    sequence = drafted_sequence()
    assert policy.wants_hidden(sequence)
    World(Q4_K_M, 0 * GOOD).run(policy, 64, sequence)
    assert not policy.wants_hidden(sequence)
    assert not policy.wants_hidden(new_sequence([0], 9)), "it has no heads"


def test_the_hidden_state_is_there_when_a_pause_ends() -> None:
    """One without it would be put off: the world gives states only where they were asked for."""
    policy = adaptive(BF16)
    sequence = drafted_sequence()
    sequence.hidden = np.zeros((1, 4), np.float32)
    world = World(BF16, 0 * GOOD)
    drafted = []
    for i in range(150):
        (proposal,) = policy.propose([sequence])
        if proposal.trees:
            drafted.append(i)
        world.go(policy, [sequence], [proposal])
    gaps = np.diff(drafted)
    assert gaps.max() == FIRST_PAUSE + 1, drafted


# From one sequence to the next


def in_a_row(
    times: Times, policy: AdaptivePolicy, heads: float, n: int, *, at_a_time: int = 1, seed: int = 0
) -> list[float]:
    """The speeds of n times some sequences of 128 tokens; heads: of what GOOD promises."""
    speeds = []
    for i in range(n):
        sequences = [drafted_sequence() for _ in range(at_a_time)]
        speeds.append(World(times, heads * GOOD, 100 * seed + i).run(policy, 128, *sequences))
    return speeds


@CURVES
@pytest.mark.parametrize("at_a_time", [1, 4])
def test_useless_heads_cost_further_sequences_nearly_nothing(times: Times, at_a_time: int) -> None:
    speeds = [
        in_a_row(times, adaptive(times), 0.0, 8, at_a_time=at_a_time, seed=seed)[1:]
        for seed in range(3)
    ]
    assert np.mean(speeds) >= 0.985, speeds


def test_a_new_sequence_does_not_draft_what_the_last_one_lost_by() -> None:
    policy = adaptive(BF16)
    in_a_row(BF16, policy, 0.0, 1)
    sequence = drafted_sequence()
    sequence.hidden = np.zeros((1, 4), np.float32)
    assert not policy.wants_hidden(sequence)
    assert policy.propose([sequence]) == [NO_DRAFT]
    assert adaptive(BF16).wants_hidden(sequence), "the control"


def test_heads_that_become_good_are_found_again() -> None:
    policy = adaptive(BF16)
    in_a_row(BF16, policy, 0.0, 4)
    in_a_row(BF16, policy, 1.0, 4)
    assert np.mean(in_a_row(BF16, policy, 1.0, 4)) > 1.4


@CURVES
def test_a_rewriting_after_chats_drafts_at_once(times: Times) -> None:
    """N-grams that were worth little: short matches, seldom right. Then long ones."""
    policy = adaptive(times, heads=False, continuation=15)
    for i in range(6):
        chat = new_sequence([0], 10**9)
        continuing(chat, NGRAM, 0.3, 0.4, 3, i)
        World(times, 0 * GOOD, i).run(policy, 128, chat)
    world = World(times, 0 * GOOD)
    rewriting = new_sequence([0], 10**9)
    continuing(rewriting, NGRAM, 0.95, 1.0, 32, 9)
    assert world.run(policy, 16, rewriting) > 1.5


# Continuations, and sources of any number


def test_continuations_pause_where_the_tokens_so_far_say_nothing_about_the_next_ones() -> None:
    rng = np.random.default_rng(0)
    base = FakeBase(n_vocab=6)  # six tokens at random: matches everywhere, and none means anything
    policy = adaptive(Q4_K_M, heads=False, continuation=7)
    prompt = rng.integers(0, 6, 50).tolist()
    sequence = new_sequence(prompt, 400, SamplingParams(temperature=2.0), n_vocab=6)
    sequence.continuation_drafters[NGRAM] = NgramDrafter(sequence.tokens)
    prefill(base, sequence)
    drafted = []
    while not sequence.finished:
        before = sum(sequence.statistics.drafted)
        step(base, [sequence], policy)
        drafted.append(sum(sequence.statistics.drafted) - before)
    assert 0 < sum(drafted) < 120 and sum(drafted[-100:]) < 20


def continuing(
    sequence: Sequence, name: str, rate: float, matches: float, agreeing: int, seed: int
) -> None:
    sequence.continuation_drafters[name] = ChanceDrafter(
        name, sequence, rate=rate, matches=matches, agreeing=agreeing, seed=seed
    )


@CURVES
@pytest.mark.parametrize("n_sequences", [1, 4, 16])
def test_a_good_continuation_earns_much(times: Times, n_sequences: int) -> None:
    """Measured by curve: 3.8, 2.4, 2.1 alone; 2.3, 1.6, 2.1 with 4; 1.4, 1.5, 2.3 with 16."""
    speeds = []
    for seed in range(3):
        sequences = [drafted_sequence() for _ in range(n_sequences)]
        for i, sequence in enumerate(sequences):
            continuing(sequence, NGRAM, 0.95, 1.0, 32, 100 * seed + i)
        world = World(times, 0 * GOOD, seed)
        speeds.append(world.run(adaptive(times, continuation=15), 256, *sequences))
    least = {
        BF16: {1: 3.4, 4: 2.2, 16: 1.3},
        Q4_0: {1: 2.1, 4: 1.5, 16: 1.4},
        Q4_K_M: {1: 1.9, 4: 1.9, 16: 2.0},
    }
    assert np.mean(speeds) >= least[times][n_sequences], speeds


def three_sources() -> AdaptivePolicy:
    recycled = ContinuationSource("recycled", 3, first_acceptance=(0.0, 0.5))
    sources: list[SourceModel] = [heads_source(), ContinuationSource(NGRAM, 7), recycled]
    return AdaptivePolicy(curve(LONG), sources)


def test_sources_of_any_number_share_the_tree() -> None:
    """Two continuations and heads: each earns its share, and one that is useless pauses."""
    alone = World(LONG, GOOD).run(adaptive(LONG), 400)
    speeds = {}
    for rate in (0.0, 0.9):
        sequence = drafted_sequence()
        continuing(sequence, NGRAM, 0.9, 0.3, 16, 1)
        continuing(sequence, "recycled", rate, 0.6, 4, 2)
        policy = three_sources()
        speeds[rate] = World(LONG, GOOD).run(policy, 400, sequence)
        state = policy._states[sequence]
        [recycled] = [source for source in state.sources if source.model.name == "recycled"]
        expected = recycled.history.expect(1, untried=False).tokens[1]
        assert (expected < 0.1) == (rate == 0.0)
    assert alone < speeds[0.0] < speeds[0.9]


def test_a_second_tree_source_is_drafted_where_it_pays() -> None:
    """A dear one that is good, a cheap one that is bad."""
    paths = grow(GOOD, 15)
    for dear in (0.3, 30.0):
        sources: list[SourceModel] = [
            TreeSource("cheap", paths, 0.3 * GOOD, [0.01] * 4),
            TreeSource("dear", paths, GOOD, [dear] * 4),
        ]
        policy = AdaptivePolicy(curve(BF16), sources)
        assert policy.max_leaves == 2 * heads_source().max_leaves
        lot = Lot(BF16, 1, policy)
        for sequence in lot.sequences:
            sequence.tree_drafters = {name: ConstantDrafter(0) for name in ("cheap", "dear")}
        (proposal,) = policy.propose(lot.sequences)
        drafted = [part.source for part in proposal.trees]
        assert ("dear" in drafted) == (dear < 1), drafted


def test_no_sources_are_plain_decoding() -> None:
    policy = AdaptivePolicy(curve(BF16), [])
    sequences = [drafted_sequence(), new_sequence([1], 9)]
    assert (policy.max_leaves, policy.max_nodes) == (1, 1)
    for n in (1, 2):
        for _ in range(5):
            assert policy.propose(sequences[:n]) == [NO_DRAFT] * n
            for sequence in sequences[:n]:
                policy.record(sequence, StepOutcome(NO_DRAFT, [], [7], n, 1.0))
    assert not any(policy.wants_hidden(sequence) for sequence in sequences)


def test_the_widest_draft_has_room_for_all_sources() -> None:
    widest = max(len(Tree(grow(GOOD, n)).leaves) for n in range(16))
    assert adaptive(BF16).max_leaves == widest and adaptive(BF16).max_nodes == 16
    both = adaptive(BF16, continuation=7)
    assert (both.max_leaves, both.max_nodes) == (widest + 1, 23)
    assert adaptive(BF16, heads=False, continuation=7).max_leaves == 1
    cheap = tuple((n, 1 + n / 100) for n in range(1, 17))
    limited = AdaptivePolicy(curve(cheap), [heads_source()], max_nodes=4)
    assert limited.max_nodes == 4
    assert Lot(cheap, 1, limited).nodes() == [3]


def test_a_finished_sequence_is_forgotten() -> None:
    policy = adaptive(BF16)
    kept = drafted_sequence()
    gone = drafted_sequence()
    World(BF16, GOOD).run(policy, 20, gone)
    World(BF16, GOOD).run(policy, 20, kept)
    reference = weakref.ref(gone)
    del gone
    gc.collect()
    assert reference() is None and len(policy._states) == 1


# Many sequences


@pytest.mark.parametrize("n_sequences", [4, 16])
@pytest.mark.parametrize("rates", [0 * GOOD, GOOD], ids=["useless", "good"])
@pytest.mark.parametrize("dearer", [1.0, 1.4])
def test_many_sequences_are_never_slower_for_it(
    n_sequences: int, rates: npt.NDArray[np.float64], dearer: float
) -> None:
    """Useless heads, a full load, drafted steps that take longer than predicted."""
    speeds = []
    for seed in range(3):
        sequences = [drafted_sequence() for _ in range(n_sequences)]
        speeds.append(World(LONG, rates, seed, dearer).run(adaptive(LONG), 256, *sequences))
    assert np.median(speeds) >= 0.96, speeds
    if n_sequences == 4 and rates.any() and dearer == 1.0:
        assert np.median(speeds) > 1.15, "there drafts pay"
    everyone = [drafted_sequence() for _ in range(16)]
    fixed = World(LONG, rates, 0, dearer).run(FixedPolicy(Tree(grow(GOOD, 7))), 64, *everyone)
    assert fixed < 0.96, "the control: a tree for everyone is dear"


def test_many_draft_on_where_one_alone_would_not() -> None:
    """On Q4_K_M 16 rows take as long as 12, for four sequences; alone the heads hardly pay."""
    speeds = []
    for seed in range(4):
        sequences = [drafted_sequence() for _ in range(4)]
        speeds.append(World(Q4_K_M, GOOD, seed).run(adaptive(Q4_K_M), 256, *sequences))
    assert min(speeds) > 1.1


class Lot:
    """Sequences with drafts of known worth: what does a policy give them?"""

    def __init__(self, times: Times, n: int, policy: AdaptivePolicy | None = None) -> None:
        self.times = times
        self.sequences = [new_sequence([i] * 40, 999) for i in range(n)]
        for sequence in self.sequences:
            sequence.tree_drafters[HEADS] = Knowing([], [], GROWN)
            sequence.hidden = np.zeros((1, 8), np.float32)
        self.know(policy or adaptive(times))

    def know(self, policy: AdaptivePolicy) -> None:
        """Let a policy see what plain steps take before it drafts."""
        self.policy = policy
        for n in range(1, 17):
            for _ in range(2):
                policy._step_time.begin_step(n, 0)
                policy._step_time.record(n, curve(self.times).seconds_for(n, 0))

    def nodes(self) -> list[int]:
        return [n_nodes(proposal) for proposal in self.policy.propose(self.sequences)]

    def go(self, dearer: float) -> int:
        """Take a step, as dear as the curve says, with drafts so many times; return its rows."""
        n = len(self.sequences)
        n_rows = n + sum(self.nodes())
        seconds = curve(self.times).seconds_for(n_rows, 0)
        if n_rows > n:
            seconds *= dearer
        outcome = StepOutcome(NO_DRAFT, [], [1], n_rows, seconds)
        self.policy.record(self.sequences[0], outcome)
        return n_rows


def n_nodes(proposal: Proposal) -> int:
    trees = sum(len(part.tree) - 1 for part in proposal.trees)
    return trees + sum(part.n_nodes for part in proposal.continuations)


@pytest.mark.parametrize("times", [BF16, Q4_K_M], ids=["BF16", "Q4_K_M"])
def test_trees_shrink_as_sequences_come(times: Times) -> None:
    each = [float(np.mean(Lot(times, n).nodes())) for n in (1, 2, 4, 8, 16)]
    assert each[0] > each[-1]
    if times is BF16:  # on Q4_K_M 12 rows take as long as 16, which four sequences make use of
        assert each == sorted(each, reverse=True) and each[0] >= 2, each


def test_nodes_go_to_the_sequences_that_gain_by_them() -> None:
    lot = Lot(BF16, 4)
    lot.nodes()
    for sequence in lot.sequences[:2]:  # their drafts have all been wrong
        for _ in range(20):
            wrong = lot.policy.propose([sequence])[0]
            guesses = [[-1] * (len(part.tree) - 1) for part in wrong.trees]
            lot.policy.record(sequence, StepOutcome(wrong, guesses, [7], 1, 1.0))
    lot.know(lot.policy)
    nodes = lot.nodes()
    assert sum(nodes[:2]) == 0 < min(nodes[2:]), nodes


def test_steps_that_are_dearer_than_the_curve_says_draft_less() -> None:
    lot = Lot(BF16, 3)
    before = sum(lot.nodes())
    rows = [lot.go(3.0) for _ in range(60)]
    assert sum(lot.nodes()) == 0 < before and rows.count(3) > 50
    after = [lot.go(1.0) for _ in range(200)]
    assert sum(after[-100:]) > 100 * (3 + before / 2), "the dear is tried again, and pays"


def test_now_and_then_a_step_goes_without_drafts() -> None:
    """Or nobody would notice that those have become cheap."""
    lot = Lot(BF16, 3)
    lot.policy = adaptive(BF16)
    rows = [lot.go(1.0) for _ in range(100)]
    assert [i for i, n in enumerate(rows) if n == 3] == [0, 1, 50, 99]


def test_a_request_that_wants_no_drafts_gets_none() -> None:
    lot = Lot(BF16, 3)
    lot.sequences[1].tree_drafters.clear()
    nodes = lot.nodes()
    assert nodes[1] == 0 < min(nodes[0], nodes[2])


def test_a_sequence_without_a_hidden_state_drafts_no_tree() -> None:
    for n in (1, 3):
        lot = Lot(BF16, n)
        lot.sequences[0].hidden = None
        assert lot.nodes()[0] == 0
        lot.sequences[0].hidden = np.zeros((1, 8), np.float32)
        assert lot.nodes()[0] > 0


def test_no_step_is_wider_than_allowed() -> None:
    lot = Lot(BF16, 6, adaptive(BF16, max_rows=16))
    assert 0 < sum(lot.nodes()) <= 10
