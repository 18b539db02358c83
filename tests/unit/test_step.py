"""One step after another is plain decoding, whatever was drafted.

Wrong masks, stale cells, wrong acceptance show.
"""

from __future__ import annotations

import collections.abc as abc
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_base import FakeBase
from oracles import EXTRAS, Knowing, Oracle, new_sequence, plain, prefill

from model.decoding.draft_policy import FixedPolicy, StepOutcome
from model.decoding.drafters.drafter import HEADS, NGRAM, ConstantDrafter, RandomDrafter
from model.decoding.drafters.ngram import NgramDrafter
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.sequence import Sequence
from model.decoding.step import step
from model.trees.tree import Tree

TREES = [
    Tree.chain(3),
    Tree.product([3, 2, 2]),
    Tree([(0,), (1,), (1, 0), (1, 0, 0), (2,)]),
    Tree.product([8]),
]


def run(
    base: FakeBase,
    tree: Tree,
    params: SamplingParams,
    n: int = 60,
    miss: float = 0.2,
    look_inside: bool = True,
) -> Sequence:
    sequence = new_sequence([1, 2, 3], n, params)
    sequence.seq_ids = range(len(tree.leaves))
    sequence.tree_drafters[HEADS] = Oracle(base, sequence, tree, miss)
    prefill(base, sequence)
    while not sequence.finished:
        step(base, [sequence], FixedPolicy(tree))
        for seq_id in sequence.seq_ids if look_inside else ():
            assert base.text_of(seq_id) == sequence.tokens[:-1], (
                "every id holds the committed tokens, nothing else"
            )
    return sequence


@pytest.mark.parametrize("tree", TREES, ids=repr)
@pytest.mark.parametrize("own_context", [True, False])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=3),
        SamplingParams(temperature=1.2, top_k=9, top_p=0.8, seed=4),
    ],
    ids=repr,
)
def test_the_output_is_plain_decodings(
    tree: Tree, params: SamplingParams, own_context: bool
) -> None:
    base = FakeBase(n_seq_max=len(tree.leaves) if own_context else 64)
    sequence = run(base, tree, params)
    assert sequence.tokens == plain(base, [1, 2, 3], 60, params)
    assert sequence.statistics.acceptance_length > 1.4, (
        "the oracle's drafts must be accepted, or nothing was tested"
    )
    assert tree.max_depth == 1 or sequence.statistics.accepted[1] > 3


class Looping(FakeBase):
    """A fake model whose output goes in circles: its logits depend on the last token alone."""

    def logits_of(self, history: list[int]) -> npt.NDArray[np.float32]:
        return super().logits_of(history[-1:])


@pytest.mark.parametrize("make", [FakeBase, Looping])
@pytest.mark.parametrize("with_heads", [False, True])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.5, seed=3)], ids=repr
)
def test_n_grams_beside_a_tree_change_nothing(
    make: type[FakeBase], with_heads: bool, params: SamplingParams
) -> None:
    tree = Tree.product([2, 2]) if with_heads else Tree([])
    policy = FixedPolicy(tree, 7)
    base = make(n_seq_max=policy.max_leaves)
    sequence = new_sequence([1, 2, 3], 120, params)
    sequence.seq_ids = range(policy.max_leaves)
    sequence.continuation_drafters[NGRAM] = NgramDrafter(sequence.tokens)
    if with_heads:
        sequence.tree_drafters[HEADS] = Oracle(base, sequence, tree, 0.4)
    prefill(base, sequence)
    while not sequence.finished:
        step(base, [sequence], policy)
        for seq_id in sequence.seq_ids:
            assert base.text_of(seq_id) == sequence.tokens[:-1], (
                "every id holds the committed tokens, nothing else"
            )
    assert sequence.tokens == plain(base, [1, 2, 3], 120, params)
    if make is Looping and not params.temperature:
        assert sequence.statistics.accepted_by_source[NGRAM] > 20, "or nothing was tested"


def drafted(
    base: FakeBase, tree: Tree, params: SamplingParams, known: list[int], prompt: list[int]
) -> Sequence:
    sequence = new_sequence(prompt, len(known) - len(prompt), params, n_vocab=base.n_vocab)
    sequence.seq_ids = range(len(tree.leaves))
    sequence.tree_drafters[HEADS] = Knowing(known, sequence.tokens, tree)
    prefill(base, sequence)
    while not sequence.finished:
        step(base, [sequence], FixedPolicy(tree))
    return sequence


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("tree", [Tree.chain(3), Tree.product([3, 2])], ids=repr)
def test_every_sampling_option_leaves_plain_decodings_output(name: str, tree: Tree) -> None:
    base, prompt, params = FakeBase(n_vocab=12), [1, 2, 3], EXTRAS[name]
    known = plain(base, prompt, 80, params)
    sequence = drafted(base, tree, params, known, prompt)
    assert sequence.tokens == known
    assert sequence.statistics.acceptance_length > 1.4, (
        "drafts must be accepted, or nothing was tested"
    )
    without = SamplingParams(temperature=params.temperature, seed=params.seed)
    assert known != plain(base, prompt, 80, without)


def test_negative_control_a_sampler_that_does_not_follow_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, tree, params, prompt = (
        FakeBase(n_vocab=12),
        Tree.product([3, 2]),
        EXTRAS["frequency"],
        [1, 2, 3],
    )
    known = plain(base, prompt, 80, params)
    monkeypatch.setattr(Sampler, "take", lambda self, token: None)
    assert drafted(base, tree, params, known, prompt).tokens != known


@pytest.mark.parametrize("broken", ["siblings", "no_roll_back", "second_best"])
def test_negative_controls(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above must notice a wrong mask, stale cells and a wrong acceptance."""
    base, tree, params = FakeBase(), Tree.product([3, 2, 2]), SamplingParams()
    if broken == "siblings":
        place = base.place

        def all_ids(offset: int, *rows: Any) -> int:
            end = place(offset, *rows)
            base._batch[offset:end] = [
                (p, t, set(range(12))) for p, t, _ in base._batch[offset:end]
            ]
            return end

        monkeypatch.setattr(base, "place", all_ids)
    elif broken == "no_roll_back":
        monkeypatch.setattr(base, "seq_rm", lambda *a: None)
    else:
        monkeypatch.setattr(Sampler, "choose", lambda self, logits, i: int(np.argsort(logits)[-2]))

    def check() -> None:
        sequence, tokens = run(base, tree, params, look_inside=False), [1, 2, 3]
        while len(tokens) < len(sequence.tokens):
            tokens.append(int(base.logits_of(tokens).argmax()))
        assert sequence.tokens == tokens

    with pytest.raises(AssertionError):
        check()


def test_many_sequences_share_a_batch_and_stay_apart() -> None:
    base, tree = FakeBase(), Tree.product([2, 2])
    sequences = []
    for i in range(3):
        sequence = new_sequence([5 + i, 9], 20 + 7 * i)
        sequence.seq_ids = range(4 * i, 4 * i + 4)
        sequence.tree_drafters[HEADS] = Oracle(base, sequence, tree, 0.3)
        prefill(base, sequence)
        sequences.append(sequence)
    running = list(sequences)
    while running:
        step(base, running, FixedPolicy(tree))
        running = [sequence for sequence in running if not sequence.finished]
    for i, sequence in enumerate(sequences):
        assert sequence.tokens == plain(base, [5 + i, 9], 20 + 7 * i, SamplingParams())


def test_sequences_with_one_drafter_are_drafted_in_one_call() -> None:
    calls = []

    class Counting(RandomDrafter):
        def draft(
            self,
            hidden: npt.NDArray[np.float32],
            roots: abc.Sequence[int],
            trees: abc.Sequence[Tree],
        ) -> list[list[int]]:
            calls.append((len(hidden), list(roots)))
            return super().draft(hidden, roots, trees)

    base, drafter = FakeBase(), Counting(50)
    sequences = []
    for i in range(3):
        sequence = new_sequence([i, 7], 10)
        sequence.seq_ids = range(i, i + 1)
        sequence.tree_drafters[HEADS] = drafter
        prefill(base, sequence)
        sequences.append(sequence)
    step(base, sequences, FixedPolicy(Tree.chain(2)))
    step(base, sequences, FixedPolicy(Tree.chain(2)))
    roots = [sequence.tokens[2] for sequence in sequences]
    assert calls == [(3, roots)], (
        "no states before the first step, one call for all three in the second"
    )


@pytest.mark.parametrize("length", range(4, 12))
def test_a_full_context_ends_the_sequence_where_plain_decoding_would(length: int) -> None:
    base, tree = FakeBase(), Tree.product([2, 2, 2])
    sequence = run(base, tree, SamplingParams(), n=length - 3, miss=0.0)
    assert sequence.tokens == plain(base, [1, 2, 3], length - 3, SamplingParams())
    assert sequence.finish_reason == "length"


def test_an_end_token_inside_an_accepted_path_ends_the_sequence_there() -> None:
    base = FakeBase()
    known = plain(base, [1, 2, 3], 12, SamplingParams())
    end = known[8]
    sequence = new_sequence([1, 2, 3], 96, eog=frozenset({end}))
    sequence.tree_drafters[HEADS] = Oracle(base, sequence, Tree.chain(4), 0.0)
    prefill(base, sequence)
    while not sequence.finished:
        step(base, [sequence], FixedPolicy(Tree.chain(4)))
    assert sequence.tokens == known[: known.index(end, 3) + 1] and sequence.finish_reason == "stop"
    assert base.text_of(0) == sequence.tokens[:-1]


def test_statistics_count_nodes_by_depth_and_source() -> None:
    base = FakeBase()
    sequence = new_sequence([1, 2], 40)
    sequence.tree_drafters[HEADS] = ConstantDrafter(0)
    prefill(base, sequence)
    while not sequence.finished:
        step(base, [sequence], FixedPolicy(Tree.chain(3)))
    statistics = sequence.statistics
    drafting_steps = statistics.steps - 4  # the first has no state yet, the last three no room
    assert statistics.emitted == 40 and statistics.steps <= 40
    assert statistics.drafted == [drafting_steps] * 3 and statistics.steps_by_depth == {
        3: drafting_steps
    }
    assert statistics.drafted_by_source == {HEADS: 3 * drafting_steps}
    accepted = sum(statistics.accepted)
    assert statistics.accepted_by_source[HEADS] == accepted
    assert statistics.emitted == statistics.steps + accepted, (
        "but for the last step, which max_length may cut"
    )


def test_the_policy_does_not_learn_what_log_probabilities_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = list[float]()

    class Noting(FixedPolicy):
        def record(self, sequence: Sequence, outcome: StepOutcome) -> None:
            seconds.append(outcome.seconds)

    def slow(*_: Any) -> tuple[float, tuple[()]]:
        time.sleep(0.2)
        return 0.0, ()

    monkeypatch.setattr(Sequence, "_logprobs_of", slow)
    base = FakeBase()
    sequence = new_sequence([1, 2], 1, logprobs=0)
    prefill(base, sequence)
    step(base, [sequence], Noting())
    assert sequence.statistics.seconds - seconds[0] >= 0.2


def test_a_sequence_that_is_stepped_alone_leaves_the_others_cells_alone() -> None:
    base, tree, sequences = FakeBase(n_seq_max=8), Tree.product([2, 2]), list[Sequence]()
    for i in range(2):
        sequence = new_sequence([5 + i, 9, 4], 37)
        sequence.seq_ids = range(4 * i, 4 * i + 4)
        sequence.tree_drafters[HEADS] = Oracle(base, sequence, tree, 0.5)
        prefill(base, sequence)
        sequences.append(sequence)
    before = base.text_of(4)
    for _ in range(5):
        step(base, sequences[:1], FixedPolicy(tree))
    assert base.text_of(4) == before == [6, 9]
