"""Many sequences on one context.

Each is its sequence alone, cells are shared and freed, nobody waits for ever.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_base import FakeBase
from oracles import EXTRAS, Knowing, new_sequence, plain
from simulation import GOOD, adaptive

from model.decoding.draft_policy import DraftPolicy, FixedPolicy
from model.decoding.drafters.drafter import HEADS, NGRAM
from model.decoding.drafters.ngram import NgramDrafter
from model.decoding.prompt_cache import PromptCache, common_prefix
from model.decoding.sampling import SamplingParams
from model.decoding.scheduler import Scheduler
from model.decoding.sequence import Sequence
from model.errors import ContextError
from model.trees.search import grow
from model.trees.tree import Tree

TREE = Tree.product([2, 2])
GROWN = Tree(grow(GOOD, 15))
PARAMS = [SamplingParams(), SamplingParams(temperature=0.8, seed=3), EXTRAS["frequency"]]


class Counting(FakeBase):
    """Counts prompt tokens, steps and what was restored, and the most cells there were."""

    n_read = n_steps = most = 0

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.restored = list[int]()  # sequence ids

    def restore_state(self, seq: int, state: npt.NDArray[np.uint8]) -> bool:
        self.restored.append(seq)
        return super().restore_state(seq, state)

    def prefill(self, tokens: npt.NDArray[np.int32], pos: int, seq: int) -> None:
        self.n_read += len(tokens)
        assert pos == len(self.text_of(seq)), "a prompt goes on where its sequence ends"
        super().prefill(tokens, pos, seq)
        self.most = max(self.most, len(self.cells))

    def decode_placed(self, n: int) -> None:
        self.n_steps += 1
        super().decode_placed(n)
        self.most = max(self.most, len(self.cells))


def make_sequences(
    base: FakeBase, n: int, tree: Tree | None = None, length: int = 30, same: int = 0
) -> list[Sequence]:
    """Prompts and outputs of many lengths; the first `same` tokens of all prompts are alike."""
    rng = np.random.default_rng(n)
    sequences = list[Sequence]()
    for i in range(n):
        prompt = [7] * same + rng.integers(0, 50, int(rng.integers(1, length))).tolist()
        eog = frozenset({7}) if i % 2 else frozenset[int]()
        sequence = new_sequence(
            prompt, int(rng.integers(1, length)), PARAMS[i % len(PARAMS)], eog=eog
        )
        if tree is not None:
            known = alone(base, sequence, eog)
            sequence.tree_drafters[HEADS] = Knowing(known, sequence.tokens, tree, seed=i)
            sequence.continuation_drafters[NGRAM] = NgramDrafter(sequence.tokens)
        sequences.append(sequence)
    return sequences


def alone(base: FakeBase, sequence: Sequence, eog: frozenset[int] | None = None) -> list[int]:
    """What the fake model generates for a sequence on its own."""
    n = sequence.n_prompt
    eog = sequence._vocabulary.eog if eog is None else eog
    tokens = plain(base, sequence.tokens[:n], sequence.max_length - n, sequence.sampler.params)
    ended = next((i for i in range(n, len(tokens)) if tokens[i] in eog), len(tokens) - 1)
    return tokens[: ended + 1]


def run(scheduler: Scheduler, sequences: list[Sequence]) -> list[Sequence]:
    """Run all sequences; return them in the order in which they ended."""
    for sequence in sequences:
        scheduler.add(sequence)
    ended = list[Sequence]()
    while scheduler.has_unfinished:
        ended += scheduler.step()
    return ended


def saving() -> PromptCache:
    return PromptCache(1 << 20)


def many(base: FakeBase, policy: DraftPolicy | None = None, **options: Any) -> Scheduler:
    defaults = {"max_running": 3, "n_cells": 2000}
    return Scheduler(base, policy or FixedPolicy(), **{**defaults, **options})


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("kind", ["plain", "tree", "shared"])
@pytest.mark.parametrize("slots", [1, 4, 9])
def test_every_sequence_is_the_sequence_alone(slots: int, kind: str, prefix_cache: bool) -> None:
    policy: DraftPolicy = FixedPolicy(TREE) if kind == "tree" else FixedPolicy()
    if kind == "shared":  # drafts cost next to nothing
        policy = adaptive(tuple((n, 1 + n / 1000) for n in range(1, 20)), ngram=True)
    cells = 130 * slots
    base = Counting(n_seq_max=slots * policy.max_leaves, n_ctx=cells)
    sequences = make_sequences(
        base, 14, {"plain": None, "tree": TREE, "shared": GROWN}[kind], same=5
    )
    scheduler = many(
        base,
        policy,
        max_running=slots,
        n_cells=cells,
        prefill_chunk=7,
        prompt_cache=saving() if prefix_cache else None,
    )
    ended = run(scheduler, sequences)
    assert set(ended) == set(sequences)
    for sequence in sequences:
        assert sequence.finished and sequence.tokens == alone(base, sequence)
    accepted = sum(sum(sequence.statistics.accepted) for sequence in sequences)
    assert kind == "plain" or accepted > 20, "or nothing was tested"
    scheduler.kv_slots.clear()
    assert base.cells == [] and scheduler.kv_slots.n_reserved == 0, (
        "what has finished leaves no cell behind"
    )


@pytest.mark.parametrize("fault", ["not cleared", "not copied", "too much copied"])
def test_negative_controls(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = FakeBase(n_seq_max=16)
    sequences = make_sequences(base, 12, TREE, same=9)
    if fault == "not cleared":
        monkeypatch.setattr(base, "seq_rm", lambda *_: None)
    elif fault == "not copied":
        monkeypatch.setattr(base, "seq_cp", lambda *_: None)
    else:
        monkeypatch.setattr("model.decoding.kv_slots.common_prefix", lambda a, b, most: most)
    run(
        many(base, FixedPolicy(TREE), max_running=4, n_cells=4000, prompt_cache=saving()), sequences
    )
    assert any(sequence.tokens != alone(base, sequence) for sequence in sequences)


def test_a_long_prompt_does_not_hold_up_the_running() -> None:
    base = Counting()
    scheduler = many(base, n_cells=4000, prefill_chunk=10)
    quick = new_sequence([1, 2], 28)
    slow = new_sequence([i % 50 for i in range(96)], 2)
    short = new_sequence([40] * 14, 2)
    scheduler.add(quick)
    assert scheduler.step() == []
    scheduler.add(slow)
    scheduler.add(short)
    for steps in range(2, 12):
        n_read = base.n_read
        scheduler.step()
        assert len(quick.tokens) == 2 + steps and base.n_read - n_read <= 10
    assert short.finished and not slow.finished, (
        "a short prompt does not wait for the end of a long one"
    )
    while scheduler.has_unfinished:
        scheduler.step()
    assert slow.tokens == alone(base, slow) and short.tokens == alone(base, short)


def test_slow_prompts_are_read_in_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    base, clock = Counting(), [0.0]

    def slow(tokens: npt.NDArray[np.int32], pos: int, seq: int) -> None:
        clock[0] += 0.004 * len(tokens)
        Counting.prefill(base, tokens, pos, seq)

    monkeypatch.setattr(base, "prefill", slow)
    monkeypatch.setattr("model.decoding.scheduler.perf_counter", lambda: clock[0])
    scheduler = Scheduler(base, FixedPolicy(), max_running=2, n_cells=4000, max_stall_s=0.1)
    for prompt in ([1] * 40, [2] * 300):
        scheduler.add(new_sequence(prompt, 400 - len(prompt)))
    n_read = [0]
    while scheduler.n_running < 2:
        scheduler.step()
        n_read.append(base.n_read)
    chunks = np.diff(n_read).tolist()
    assert chunks[0] == 32 and max(chunks[3:]) in (24, 25) and sum(chunks) == 39 + 299, chunks


def test_sequences_wait_for_a_slot_and_for_room_in_their_order() -> None:
    scheduler = many(FakeBase(), max_running=2, n_cells=100)
    first, second, third, fourth = (new_sequence([1], n) for n in (59, 49, 39, 1))
    for sequence in (first, second, third, fourth):
        scheduler.add(sequence)
    scheduler.step()
    assert (scheduler.n_admitted, len(scheduler.waiting)) == (1, 3), (
        "no room for the second, and nobody overtakes"
    )
    scheduler.abort(first)
    scheduler.step()
    assert (scheduler.n_admitted, len(scheduler.waiting)) == (2, 1), (
        "90 of 100 cells; a third slot there is not"
    )
    with pytest.raises(ContextError, match="no room for a sequence of 101"):
        scheduler.add(new_sequence([1], 100))


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_cache_never_overflows(prefix_cache: bool) -> None:
    """Nine slots, but cells for about three sequences; FakeBase raises where there is no room."""
    base = Counting(n_seq_max=36, n_ctx=230)
    sequences = make_sequences(base, 40, TREE, same=20)
    run(
        many(
            base,
            FixedPolicy(TREE),
            max_running=9,
            n_cells=230,
            prompt_cache=saving() if prefix_cache else None,
        ),
        sequences,
    )
    assert all(sequence.tokens == alone(base, sequence) for sequence in sequences)
    assert 100 < base.most <= 230


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_an_aborted_sequence_frees_its_slot_and_leaves_the_others_alone(prefix_cache: bool) -> None:
    base = FakeBase(n_seq_max=16)
    sequences = make_sequences(base, 9, TREE)
    scheduler = many(
        base,
        FixedPolicy(TREE),
        max_running=4,
        n_cells=600,
        prefill_chunk=9,
        prompt_cache=saving() if prefix_cache else None,
    )
    running, prefilling, waiting = sequences[0], new_sequence([9] * 80, 120), new_sequence([9], 500)
    running.max_length = 300
    for sequence in (running, prefilling, waiting):
        scheduler.add(sequence)
    scheduler.step()
    scheduler.step()
    before = scheduler.kv_slots.n_reserved
    for sequence in (running, prefilling, waiting, running):
        scheduler.abort(sequence)
    assert not scheduler.has_unfinished and scheduler.kv_slots.n_reserved <= before - 400
    assert not running.finished
    run(scheduler, sequences[1:])
    assert all(sequence.tokens == alone(base, sequence) for sequence in sequences[1:])
    again = new_sequence([9] * 80, 10)
    run(scheduler, [again])
    assert again.tokens == alone(base, again)
    scheduler.kv_slots.clear()
    assert base.cells == []


def generated(base: Counting, scheduler: Scheduler, prompt: list[int], n: int = 5) -> Sequence:
    sequence = new_sequence(prompt, n)
    run(scheduler, [sequence])
    assert sequence.tokens == plain(base, prompt, n, SamplingParams())
    return sequence


def test_a_prompt_that_goes_on_with_a_finished_sequence_reads_only_what_is_new() -> None:
    base = Counting()
    scheduler = many(base, FixedPolicy(TREE), prompt_cache=saving())
    first = generated(base, scheduler, list(range(40)))
    assert base.n_read == 39 and first.n_reused == 0
    turn = generated(base, scheduler, [*first.tokens, 1, 2, 3])
    assert base.n_read == 39 + 3 and turn.n_reused == len(first.tokens) - 1
    again = generated(base, scheduler, list(range(40)))
    assert base.n_read == 42 and again.n_reused == 39, "all but the root"
    other = generated(base, scheduler, [*range(10), *range(30, 0, -1)])
    assert other.n_reused == 10 and base.n_read == 42 + 29
    kept = generated(base, scheduler, list(range(40)))
    assert kept.n_reused == 39, "what shares a prefix with it did not cost it its place"
    scheduler.kv_slots.clear()
    assert base.cells == []


def test_a_prompt_shares_the_cells_of_a_running_sequence() -> None:
    base = Counting()
    scheduler = many(base, FixedPolicy(TREE), max_running=2, prompt_cache=saving())
    first = new_sequence(list(range(40)), 20)
    scheduler.add(first)
    scheduler.step()
    second = new_sequence([*range(40), 3], 19)
    run(scheduler, [second])
    assert second.n_reused == 40 and second.tokens == alone(base, second)
    assert first.tokens == alone(base, first)


def test_sequences_of_one_prompt_read_it_once() -> None:
    base = Counting()
    scheduler = many(base, max_running=5, prefill_chunk=8, prompt_cache=saving())
    prompt = [*range(45), 5]
    sequences = [
        new_sequence(prompt, 14, SamplingParams(temperature=1.0, seed=i)) for i in range(4)
    ]
    run(scheduler, sequences)
    assert base.n_read == 45 and len({tuple(sequence.tokens) for sequence in sequences}) == 4
    assert all(sequence.tokens == alone(base, sequence) for sequence in sequences)


def test_a_prompt_whose_logits_are_wanted_is_read_whole() -> None:
    base = Counting()
    scheduler = many(base, prefill_chunk=8, prompt_cache=saving())
    prompt = list(range(30))
    generated(base, scheduler, prompt)
    echoed = new_sequence(prompt, 0, echo=True, logprobs=1)
    run(scheduler, [echoed])
    assert echoed.n_reused == 0 and echoed.tokens == prompt, (
        "nothing to generate: finished once it is read"
    )
    assert echoed.finish_reason == "length"
    outputs = echoed.prompt_output().tokens
    assert [output.id for output in outputs] == prompt and outputs[0].logprob is None
    for i, output in enumerate(outputs[1:], 1):
        logits = base.logits_of(prompt[:i]).astype(np.float64)
        logprob = logits[prompt[i]] - np.log(np.exp(logits).sum())
        assert output.logprob == pytest.approx(logprob, abs=1e-5)
    fresh = new_sequence(prompt, 3, use_prefix_cache=False)
    run(scheduler, [fresh])
    assert fresh.n_reused == 0 and fresh.tokens == alone(base, fresh)


def test_what_finished_sequences_leave_takes_no_cells_and_has_a_limit() -> None:
    """FakeBase's states take 8 bytes a token: there is room for two of three prompts."""
    base = Counting()
    scheduler = many(base, max_running=8, prompt_cache=PromptCache(8 * 100))
    prompts = [[i] * 40 for i in range(3)]
    for prompt in prompts[:2]:
        generated(base, scheduler, prompt)
        assert base.cells == []
    generated(base, scheduler, prompts[0])  # used again
    generated(base, scheduler, prompts[2])
    assert generated(base, scheduler, prompts[0]).n_reused == 39
    assert generated(base, scheduler, prompts[1]).n_reused == 0, "the least recently used went"
    too_long = [7] * 150
    generated(base, scheduler, too_long)
    assert generated(base, scheduler, too_long).n_reused == 0


def test_a_saved_sequence_that_is_gone_on_with_is_kept_once() -> None:
    base = Counting()
    cache = PromptCache(1 << 20)
    scheduler = many(base, prompt_cache=cache)
    first = generated(base, scheduler, list(range(40)))
    longer = generated(base, scheduler, [*first.tokens, 1, 2, 3])
    assert cache.n_bytes == 8 * (len(longer.tokens) - 1)
    generated(base, scheduler, list(range(30)))
    both = cache.n_bytes
    generated(base, scheduler, list(range(30)))
    assert cache.n_bytes == both, "what is covered by a saved sequence is not saved again"


def test_what_runs_moves_to_the_low_cells_when_what_was_below_has_finished() -> None:
    base = Counting()
    sequences = [new_sequence([1] * 300, 10), new_sequence([2] * 40, 80)]
    scheduler = many(base, FixedPolicy(TREE), prompt_cache=saving())
    for sequence in sequences:
        scheduler.add(sequence)
    while sequences[0] not in scheduler.step():
        pass
    assert base.restored == [sequences[1].seq_ids.start]
    run(scheduler, [])
    assert all(sequence.tokens == alone(base, sequence) for sequence in sequences)


def test_the_common_prefix() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(0, 20))
        a, b = [5] * n + [1, 2, 3], [5] * n + [4] * int(rng.integers(0, 5))
        assert common_prefix(a, b, min(len(a), len(b))) == n
    assert common_prefix([1, 2, 3], [1, 2, 3], 2) == 2
