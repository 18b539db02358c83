"""Many slots on one context, on the fake base model: every text is the text that it is alone."""

from __future__ import annotations

import numpy as np
import pytest
from fake_base import FakeBase

from model.decoding.batching import Batch
from model.decoding.drafting import RandomDrafter
from model.decoding.planning import FixedPlan
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.step import Slot
from model.trees.tree import Tree

TREE = Tree.product([2, 2])


def make_slots(n: int = 25, tree: Tree | None = None) -> list[Slot]:
    """Slots of all kinds: prompts of 1 to 30 tokens, 1 to 40 new ones, greedy and sampled, some ended by a token."""
    rng, slots = np.random.default_rng(0), list[Slot]()
    for i in range(n):
        prompt = rng.integers(0, 50, 1 + int(rng.integers(30))).tolist()
        params = SamplingParams([0.0, 0.7, 1.3][i % 3], seed=i)
        limit = len(prompt) + 1 + int(rng.integers(40))
        slot = Slot(prompt, limit, Sampler(params), (lambda token: token == 7) if i % 2 else (lambda token: False))
        slot.drafter = RandomDrafter(50, tree.max_depth, tree.n_ranks, seed=i) if tree else None
        slots.append(slot)
    return slots


def alone(base: FakeBase, slot: Slot) -> list[int]:
    """What plain decoding makes of a slot's prompt."""
    tokens = slot.tokens[: slot.prompt_length]
    while len(tokens) < slot.limit:
        tokens.append(slot.sampler.choose(base.logits_of(tokens), len(tokens) - slot.prompt_length))
        if slot.ends(tokens[-1]):
            break
    return tokens


def run(batch: Batch, slots: list[Slot]) -> list[Slot]:
    """Run all slots; return them in the order in which they ended."""
    waiting, ended = list(slots), list[Slot]()
    while len(ended) < len(slots):
        while waiting and batch.admit(waiting[0]):
            waiting.pop(0)
        assert len(batch), "nothing runs, but something waits"
        ended += batch.step()
    assert len(batch) == 0
    return ended


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("places", [1, 4, 32])
def test_every_text_is_the_text_alone(places: int, chunk: int) -> None:
    base = FakeBase(n_seq_max=places, n_ctx=70 * places)
    slots = make_slots()
    ended = run(Batch(base, FixedPlan(), places=places, cells=70 * places, chunk=chunk), slots)
    assert {id(slot) for slot in ended} == {id(slot) for slot in slots}
    for slot in slots:
        assert slot.finished and slot.tokens == alone(base, slot)
    assert base.cells == [], "what has finished leaves no cell behind"
    assert len({len(slot.tokens) for slot in slots}) > 10, "ends at different times, or nothing was tested"


def test_trees_of_many_slots_share_the_passes() -> None:
    """Five slots have lanes, three the cells for their texts and drafts; the cache never overflows."""
    base = FakeBase(n_seq_max=20, n_ctx=230)
    slots = make_slots(tree=TREE)
    run(Batch(base, FixedPlan(TREE), places=5, cells=230), slots)
    assert all(slot.tokens == alone(base, slot) for slot in slots)
    assert base.cells == []


def test_negative_control_a_place_that_is_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    base, slots = FakeBase(n_seq_max=4), make_slots()
    monkeypatch.setattr(base, "seq_rm", lambda *_: None)
    run(Batch(base, FixedPlan(), places=4, cells=4000), slots)
    assert any(slot.tokens != alone(base, slot) for slot in slots)


def test_a_long_prompt_does_not_hold_up_the_running() -> None:
    base = FakeBase()
    batch = Batch(base, FixedPlan(), places=2, cells=1000, chunk=10)
    quick = Slot([1, 2], 8, Sampler(SamplingParams()), lambda token: False)
    slow = Slot(list(range(45)), 47, Sampler(SamplingParams()), lambda token: False)
    assert batch.admit(quick) and batch.admit(slow)
    for passes in range(1, 5):
        assert batch.step() == []
        assert (len(quick.tokens), len(slow.tokens)) == (2 + passes, 45)
    assert batch.step() == [] and len(slow.tokens) == 46
    assert [id(slot) for slot in batch.step()] == [id(quick), id(slow)]
    assert slow.tokens == alone(base, slow)


def test_no_place_or_no_room_is_said() -> None:
    batch = Batch(FakeBase(), FixedPlan(), places=2, cells=100)
    slots = [Slot([1], limit, Sampler(SamplingParams()), lambda token: False) for limit in (60, 50, 40, 1)]
    assert [batch.admit(slot) for slot in slots] == [True, False, True, False]
    batch.evict(slots[0])
    assert len(batch) == 1 and batch.admit(slots[1])


def test_an_evicted_text_leaves_the_others_alone() -> None:
    base, slots = FakeBase(n_seq_max=4), make_slots(8)
    batch = Batch(base, FixedPlan(), places=4, cells=4000)
    gone = slots[0]
    gone.limit = 400
    assert batch.admit(gone)
    batch.step()
    waiting = slots[1:]
    while waiting or len(batch):
        while waiting and batch.admit(waiting[0]):
            waiting.pop(0)
        batch.step()
        if len(waiting) == 3 and not gone.finished:
            gone.finished = True
            batch.evict(gone)
    assert all(slot.tokens == alone(base, slot) for slot in slots[1:])
    assert base.cells == []
