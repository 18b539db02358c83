"""The scheduler under anything that may come in any order.

Add, step, abort, evict, prefix reuse (hypothesis). Every sequence must get the tokens that it would
get alone, and no cell may be lost or kept too long.
"""

from __future__ import annotations

from typing import Any

import pytest
from fake_base import FakeBase
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)
from oracles import EXTRAS, Knowing, new_sequence, plain

from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import HEADS, NGRAM
from model.decoding.drafters.ngram import NgramDrafter
from model.decoding.kv_slots import KVSlots
from model.decoding.prompt_cache import PromptCache
from model.decoding.sampling import SamplingParams
from model.decoding.scheduler import Scheduler
from model.decoding.sequence import Sequence
from model.trees.tree import Tree

TREE = Tree.product([2, 2])
POLICY = FixedPolicy(TREE, 3)
SLOTS = 3
CELLS = 120
SAVED_BYTES = 8 * 90  # of FakeBase's states: two or three sequences
PARAMS = [SamplingParams(), SamplingParams(temperature=0.8, seed=3), EXTRAS["frequency"]]
# prompts that begin alike
STEMS = [[], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 30, 31, 32], [9] * 20]


class SchedulerMachine(RuleBasedStateMachine):
    """Rules are what clients do; invariants hold after each of them."""

    unfinished = Bundle("unfinished")

    def __init__(self) -> None:
        super().__init__()
        self.base = FakeBase(n_seq_max=SLOTS * POLICY.max_leaves, n_ctx=CELLS)
        self.scheduler = Scheduler(
            self.base,
            POLICY,
            max_running=SLOTS,
            n_cells=CELLS,
            prefill_chunk=7,
            prompt_cache=PromptCache(SAVED_BYTES),
        )
        self.expected: dict[Sequence, list[int]] = {}

    @rule(
        target=unfinished,
        stem=st.sampled_from(STEMS),
        rest=st.lists(st.integers(0, 49), min_size=1, max_size=12),
        n_new=st.integers(1, 25),
        params=st.sampled_from(PARAMS),
        use_prefix_cache=st.booleans(),
        eog=st.sampled_from([frozenset[int](), frozenset({7})]),
    )
    def add(
        self,
        stem: list[int],
        rest: list[int],
        n_new: int,
        params: SamplingParams,
        use_prefix_cache: bool,
        eog: frozenset[int],
    ) -> Sequence:
        prompt = [*stem, *rest]
        known = plain(self.base, prompt, n_new, params)
        ends = [at for at in range(len(prompt), len(known)) if known[at] in eog]
        sequence = new_sequence(prompt, n_new, params, eog=eog, use_prefix_cache=use_prefix_cache)
        sequence.tree_drafters[HEADS] = Knowing(known, sequence.tokens, TREE, seed=n_new)
        sequence.continuation_drafters[NGRAM] = NgramDrafter(sequence.tokens)
        self.expected[sequence] = known[: ends[0] + 1] if ends else known
        self.scheduler.add(sequence)
        return sequence

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            for sequence in self.scheduler.step():
                assert sequence.tokens == self.expected.pop(sequence)

    @rule(sequence=consumes(unfinished))
    def abort(self, sequence: Sequence) -> None:
        self.scheduler.abort(sequence)
        self.expected.pop(sequence, None)

    @rule()
    def evict(self) -> None:
        self.scheduler.kv_slots.clear()

    @invariant()
    def tokens_are_those_of_the_sequence_alone(self) -> None:
        for sequence, expected in self.expected.items():
            assert sequence.tokens == expected[: len(sequence.tokens)]

    @invariant()
    def no_cell_is_lost_or_kept_too_long(self) -> None:
        owners = {
            seq_id: slot for slot in self.scheduler.kv_slots._slots for seq_id in slot.seq_ids
        }
        for position, token, seq_ids in self.base.cells:
            assert seq_ids, "a cell without a sequence is free"
            for seq_id in seq_ids:
                slot = owners[seq_id]
                assert position < slot.n_cached and slot.tokens[position] == token
        for slot in owners.values():
            first = slot.seq_ids.start
            assert self.base.text_of(first) == slot.tokens[: slot.n_cached]
            for seq_id in slot.seq_ids if slot.running else ():
                assert self.base.text_of(seq_id) == slot.tokens[: slot.n_cached]
        assert self.scheduler.kv_slots.n_reserved <= CELLS

    def teardown(self) -> None:
        for _ in range(500):  # nobody waits for ever
            if not self.scheduler.has_unfinished:
                break
            self.step(1)
        assert not self.expected and not self.scheduler.has_unfinished
        self.scheduler.kv_slots.clear()
        assert self.base.cells == [] and self.scheduler.kv_slots.n_reserved == 0


QUICK = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,  # the same examples in every run: no false alarms
    suppress_health_check=list(HealthCheck),
)


# a failure is all that is wanted, not the smallest one
CONTROLS = settings(QUICK, phases=[Phase.generate])


def test_any_order_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.decoding.kv_slots.MIN_GAP", 8)
    run_state_machine_as_test(SchedulerMachine, settings=QUICK)


@pytest.mark.parametrize(
    "fault",
    [
        "prefix taken for longer than it is",
        "rejected cells kept",
        "aborted cells kept",
        "restored prefix not cut",
        "moved to other ids",
    ],
)
def test_negative_controls(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.decoding.kv_slots.MIN_GAP", 8)
    if fault.startswith("prefix"):
        monkeypatch.setattr("model.decoding.kv_slots.common_prefix", lambda a, b, most: most)
    elif fault.startswith("restored"):
        whole = KVSlots._restore

        def restore(self: KVSlots, *args: Any) -> None:
            with monkeypatch.context() as patched:
                patched.setattr(FakeBase, "seq_rm", lambda *_: None)
                whole(self, *args)

        monkeypatch.setattr(KVSlots, "_restore", restore)
    elif fault.startswith("moved"):
        monkeypatch.setattr(KVSlots, "_spread", lambda *_: None)
    elif fault.startswith("rejected"):
        monkeypatch.setattr("model.decoding.step.roll_back", lambda *_: None)
    else:
        monkeypatch.setattr("model.decoding.kv_slots.KVSlots._remove", lambda *_: None)
    # Hypothesis may group several failures.
    with pytest.raises(Exception) as raised:  # noqa: PT011
        run_state_machine_as_test(SchedulerMachine, settings=CONTROLS)
    text = repr(raised.value) + repr(getattr(raised.value, "exceptions", ""))
    assert "AssertionError" in text or "ContextError" in text
