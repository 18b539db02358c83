"""Many slots on one context: every text is its text alone, cells are shared and freed, nobody waits for ever."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_base import FakeBase
from test_planning import BF16, GOOD, Q4_K_M, curve, live
from test_step import EXTRAS, Knowing, plain

from model.decoding.batching import Batch, _common
from model.decoding.live import LivePlan
from model.decoding.ngram import NgramIndex
from model.decoding.planning import FixedPlan, Plan, Proposal
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.slot import Slot
from model.trees.search import grow
from model.trees.tree import Tree

TREE = Tree.product([2, 2])
GROWN = Tree(grow(GOOD, 15))
PARAMS = [SamplingParams(), SamplingParams(0.8, seed=3), EXTRAS["frequency"]]


class Counting(FakeBase):
    """Counts prompt tokens and passes, and the most cells there were."""

    fed = passes = most = widest = 0

    def prefill(self, tokens: npt.NDArray[np.int32], pos: int, seq: int) -> None:
        self.fed += len(tokens)
        assert pos == len(self.text_of(seq)), "a prompt goes on where its sequence ends"
        super().prefill(tokens, pos, seq)
        self.most = max(self.most, len(self.cells))

    def decode_placed(self, n: int) -> None:
        self.passes += 1
        self.widest = max(self.widest, n)
        super().decode_placed(n)
        self.most = max(self.most, len(self.cells))


def make_slots(base: FakeBase, n: int, tree: Tree | None = None, length: int = 30, same: int = 0) -> list[Slot]:
    """Prompts and texts of many lengths; the first `same` tokens of all prompts are alike."""
    rng, slots = np.random.default_rng(n), list[Slot]()
    for i in range(n):
        prompt = [7] * same + rng.integers(0, 50, int(rng.integers(1, length))).tolist()
        params = PARAMS[i % len(PARAMS)]
        ends = (lambda token: token == 7) if i % 2 else (lambda token: False)
        slot = Slot(prompt, len(prompt) + int(rng.integers(1, length)), Sampler(params, prompt), ends)
        if tree is not None:
            slot.drafter = Knowing(alone(base, slot), slot.tokens, tree, seed=i)
            slot.ngrams = NgramIndex(slot.tokens)
        slots.append(slot)
    return slots


def alone(base: FakeBase, slot: Slot) -> list[int]:
    n = slot.prompt_length
    text = plain(base, slot.tokens[:n], slot.limit - n, slot.sampler.params)
    ended = next((i for i in range(n, len(text)) if slot.ends(text[i])), len(text) - 1)
    return text[: ended + 1]


def run(batch: Batch, slots: list[Slot]) -> list[Slot]:
    """Run all slots, first come, first served; return them in the order in which they ended."""
    waiting, ended = list(slots), list[Slot]()
    while len(ended) < len(slots):
        while waiting and batch.admit(waiting[0]):
            waiting.pop(0)
        assert len(batch), "nothing runs, but something waits"
        ended += batch.step()
    assert len(batch) == 0
    return ended


def shared_plan() -> LivePlan:
    return live(tuple((n, 1 + n / 1000) for n in range(1, 65)), branch=3)  # drafts cost next to nothing


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["plain", "tree", "shared"])
@pytest.mark.parametrize("places", [1, 4, 9])
def test_every_text_is_the_text_alone(places: int, kind: str, keep: bool) -> None:
    plan: Plan = shared_plan() if kind == "shared" else FixedPlan(TREE) if kind == "tree" else FixedPlan()
    cells = 130 * places
    base = Counting(n_seq_max=places * plan.lanes, n_ctx=cells)
    slots = make_slots(base, 14, {"plain": None, "tree": TREE, "shared": GROWN}[kind], same=5)
    batch = Batch(base, plan, places=places, cells=cells, chunk=7, keep=keep)
    ended = run(batch, slots)
    assert {id(slot) for slot in ended} == {id(slot) for slot in slots}
    for slot in slots:
        assert slot.finished and slot.tokens == alone(base, slot)
    assert kind == "plain" or sum(sum(slot.stats.accepted) for slot in slots) > 20, "or nothing was tested"
    batch.clear()
    assert base.cells == [] and batch.reserved == 0, "what has finished leaves no cell behind"


@pytest.mark.parametrize("fault", ["not cleared", "not copied", "too much copied"])
def test_negative_controls(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = FakeBase(n_seq_max=16)
    slots = make_slots(base, 12, TREE, same=9)
    if fault == "not cleared":
        monkeypatch.setattr(base, "seq_rm", lambda *_: None)
    elif fault == "not copied":
        monkeypatch.setattr(base, "seq_cp", lambda *_: None)
    else:
        monkeypatch.setattr("model.decoding.batching._common", lambda a, b, most: most)
    run(Batch(base, FixedPlan(TREE), places=4, cells=4000, keep=True), slots)
    assert any(slot.tokens != alone(base, slot) for slot in slots)


def test_a_long_prompt_does_not_hold_up_the_running() -> None:
    base = Counting()
    batch = Batch(base, FixedPlan(), places=3, cells=4000, chunk=10)
    quick = Slot([1, 2], 30, Sampler(SamplingParams()), lambda token: False)
    slow = Slot(list(range(96)), 98, Sampler(SamplingParams()), lambda token: False)
    short = Slot([40] * 14, 16, Sampler(SamplingParams()), lambda token: False)
    assert batch.admit(quick) and batch.step() == []
    assert batch.admit(slow) and batch.admit(short)
    for passes in range(2, 12):
        fed = base.fed
        batch.step()
        assert len(quick.tokens) == 2 + passes and base.fed - fed <= 10
    assert short.finished and not slow.finished, "a short prompt does not wait for the end of a long one"
    while len(batch):
        batch.step()
    assert slow.tokens == alone(base, slow) and short.tokens == alone(base, short)


def test_slow_prompts_are_fed_in_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    base, clock = Counting(), [0.0]

    def slow(tokens: npt.NDArray[np.int32], pos: int, seq: int) -> None:
        clock[0] += 0.004 * len(tokens)
        Counting.prefill(base, tokens, pos, seq)

    monkeypatch.setattr(base, "prefill", slow)
    monkeypatch.setattr("model.decoding.batching.perf_counter", lambda: clock[0])
    batch = Batch(base, FixedPlan(), places=2, cells=4000, stall_s=0.1)
    for prompt in ([1] * 40, [2] * 300):
        assert batch.admit(Slot(prompt, 400, Sampler(SamplingParams()), lambda token: False))
    fed = [0]
    while len(batch._running) < 2:
        batch.step()
        fed.append(base.fed)
    pieces = np.diff(fed).tolist()
    assert pieces[0] == 32 and max(pieces[3:]) in (24, 25) and sum(pieces) == 39 + 299, pieces


def test_no_place_or_no_room_is_said() -> None:
    batch = Batch(FakeBase(), FixedPlan(), places=2, cells=100)
    slots = [Slot([1], limit, Sampler(SamplingParams()), lambda token: False) for limit in (60, 50, 40, 1)]
    assert [batch.admit(slot) for slot in slots] == [True, False, True, False]
    batch.evict(slots[0])
    assert len(batch) == 1 and batch.admit(slots[1])


@pytest.mark.parametrize("keep", [False, True])
def test_the_cache_never_overflows(keep: bool) -> None:
    """Nine places, but cells for about three texts; FakeBase raises where there is no room."""
    base = Counting(n_seq_max=36, n_ctx=230)
    slots = make_slots(base, 40, TREE, same=20)
    run(Batch(base, FixedPlan(TREE), places=9, cells=230, keep=keep), slots)
    assert all(slot.tokens == alone(base, slot) for slot in slots)
    assert 100 < base.most <= 230


@pytest.mark.parametrize("keep", [False, True])
def test_an_evicted_text_frees_its_place_and_leaves_the_others_alone(keep: bool) -> None:
    base = FakeBase(n_seq_max=16)
    slots = make_slots(base, 9, TREE)
    batch = Batch(base, FixedPlan(TREE), places=4, cells=600, chunk=9, keep=keep)
    fed, gone = Slot([9] * 80, 200, Sampler(SamplingParams()), lambda token: False), slots[0]
    gone.limit = 300
    assert batch.admit(gone) and batch.admit(fed)
    batch.step()
    batch.step()
    before = batch.reserved
    batch.evict(gone)  # runs
    batch.evict(fed)  # its prompt is half in the cache
    assert len(batch) == 0 and batch.reserved <= before - 400 and not gone.finished
    run(batch, slots[1:])
    assert all(slot.tokens == alone(base, slot) for slot in slots[1:])
    again = Slot([9] * 80, 90, Sampler(SamplingParams()), lambda token: False)
    run(batch, [again])
    assert again.tokens == alone(base, again)
    batch.clear()
    assert base.cells == []


def text_with(base: Counting, batch: Batch, prompt: list[int], n: int = 5) -> Slot:
    slot = Slot(list(prompt), len(prompt) + n, Sampler(SamplingParams()), lambda token: False)
    run(batch, [slot])
    assert slot.tokens == plain(base, prompt, n, SamplingParams())
    return slot


def test_a_prompt_that_goes_on_with_a_finished_text_reads_only_what_is_new() -> None:
    base = Counting()
    batch = Batch(base, FixedPlan(TREE), places=3, cells=2000, keep=True)
    first = text_with(base, batch, list(range(40)))
    assert base.fed == 39 and first.reused == 0
    turn = text_with(base, batch, [*first.tokens, 1, 2, 3])
    assert base.fed == 39 + 3 and turn.reused == len(first.tokens) - 1
    again = text_with(base, batch, list(range(40)))
    assert base.fed == 42 and again.reused == 39, "all but the root"
    other = text_with(base, batch, [*range(10), *range(30, 0, -1)])
    assert other.reused == 10 and base.fed == 42 + 29
    assert text_with(base, batch, list(range(40))).reused == 39, (
        "a short beginning did not cost the long text its place"
    )
    batch.clear()
    assert base.cells == []


def test_a_prompt_shares_the_cells_of_a_running_text() -> None:
    base = Counting()
    batch = Batch(base, FixedPlan(TREE), places=2, cells=2000, keep=True)
    first = Slot(list(range(40)), 60, Sampler(SamplingParams()), lambda token: False)
    assert batch.admit(first)
    batch.step()
    second = Slot([*range(40), 3], 60, Sampler(SamplingParams()), lambda token: False)
    run(batch, [second])
    assert second.reused == 40 and second.tokens == alone(base, second)
    while len(batch):
        batch.step()
    assert first.tokens == alone(base, first)


def test_texts_from_one_prompt_read_it_once() -> None:
    base = Counting()
    batch = Batch(base, FixedPlan(), places=5, cells=2000, chunk=8, keep=True)
    prompt = [*range(45), 5]
    slots = [Slot(list(prompt), 60, Sampler(SamplingParams(1.0, seed=i)), lambda token: False) for i in range(4)]
    run(batch, slots)
    assert base.fed == 45 and len({tuple(slot.tokens) for slot in slots}) == 4
    assert all(slot.tokens == alone(base, slot) for slot in slots)


def test_a_prompt_that_is_looked_at_is_read_whole_and_shown() -> None:
    base, rows = Counting(), list[npt.NDArray[np.float32]]()
    batch = Batch(base, FixedPlan(), places=2, cells=2000, chunk=8, keep=True)
    prompt = list(range(30))
    text_with(base, batch, prompt)
    slot = Slot(list(prompt), 30, Sampler(SamplingParams()), lambda token: False)
    assert batch.admit(slot, look=lambda logits: rows.extend(logits.copy()))
    while not slot.finished:
        batch.step()
    assert len(batch) == slot.reused == 0 and slot.tokens == prompt, "no room for more: done when it is read"
    assert len(rows) == 29 and all(np.array_equal(row, base.logits_of(prompt[: i + 1])) for i, row in enumerate(rows))
    fresh = Slot(list(prompt), 33, Sampler(SamplingParams()), lambda token: False)
    assert batch.admit(fresh, fresh=True)
    while not fresh.finished:
        batch.step()
    assert fresh.reused == 0 and fresh.tokens == alone(base, fresh)


def test_kept_texts_make_room_the_least_recently_used_first() -> None:
    base = Counting(n_ctx=200)
    batch = Batch(base, FixedPlan(), places=8, cells=200, keep=True)
    prompts = [[i] * 40 for i in range(3)]
    for prompt in prompts:
        text_with(base, batch, prompt)
    text_with(base, batch, prompts[0])  # used again
    text_with(base, batch, [9] * 80, 20)
    assert text_with(base, batch, prompts[0]).reused == 39
    assert text_with(base, batch, prompts[1]).reused == 0


def test_a_text_that_nobody_comes_back_to_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.decoding.batching.PATIENCE", 100)
    base = Counting()
    batch = Batch(base, FixedPlan(), places=3, cells=2000, keep=True)
    first, other = [1] * 40, [2] * 40
    text_with(base, batch, first)
    text_with(base, batch, other, 90)
    assert text_with(base, batch, first).reused == 39
    text_with(base, batch, other, 90)
    text_with(base, batch, other, 20)
    assert text_with(base, batch, first).reused == 0


def test_the_common_beginning() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(0, 20))
        a, b = [5] * n + [1, 2, 3], [5] * n + [4] * int(rng.integers(0, 5))
        assert _common(a, b, min(len(a), len(b))) == n
    assert _common([1, 2, 3], [1, 2, 3], 2) == 2


class Pass:
    """Slots with drafts of known worth: what does a shared plan give them?"""

    def __init__(self, times: Any, slots: int, *, heads: bool = True, branch: int = 0) -> None:
        self.times = times
        self.slots = [Slot([i] * 40, 999, Sampler(SamplingParams()), lambda t: False) for i in range(slots)]
        for slot in self.slots:
            slot.drafter, slot.hidden = Knowing([], [], GROWN), np.zeros((1, 8), np.float32)
        self.know(live(times, heads=heads, branch=branch))

    def know(self, plan: LivePlan, slots: int = 16) -> None:
        """Let a plan see what plain passes take before it drafts."""
        self.plan = plan
        for n in range(1, slots + 1):
            for _ in range(2):
                plan.clock.begin(n, 0)
                plan.clock.note(n, curve(self.times).seconds_for(n, 0))

    def nodes(self) -> list[int]:
        return [len(proposal.tree) - 1 for proposal in self.plan.propose_all(self.slots)]

    def go(self, dearer: float) -> int:
        """Make a pass, as dear as the curve says, with drafts so many times; return its rows."""
        proposals = self.plan.propose_all(self.slots)
        rows, roots = sum(len(p.tree) for p in proposals), len(proposals)
        took = curve(self.times).seconds_for(rows, 0) * (dearer if rows > roots else 1.0)
        self.plan.learn(self.slots[0], Proposal(Tree([]), [], 0), [0], [1], rows, took)
        return rows


@pytest.mark.parametrize("times", [BF16, Q4_K_M], ids=["BF16", "Q4_K_M"])
def test_trees_shrink_as_slots_come(times: Any) -> None:
    each = [float(np.mean(Pass(times, slots).nodes())) for slots in (1, 2, 4, 8, 16)]
    assert each[0] > each[-1] and (each == sorted(each, reverse=True) or times is Q4_K_M), each
    assert each[0] >= 2 or times is Q4_K_M, "there 12 rows take as long as 16, which four slots make use of"


def test_nodes_go_to_the_texts_that_win_by_them() -> None:
    lot = Pass(BF16, 4)
    lot.nodes()
    for slot in lot.slots[:2]:  # their drafts have all been wrong
        assert slot.live is not None
        slot.live.expected = [50.0] * len(slot.live.expected)
        lot.plan._refresh(slot, slot.live)
    nodes = lot.nodes()
    assert sum(nodes[:2]) == 0 < min(nodes[2:])


def test_passes_that_are_dearer_than_the_curve_says_draft_less() -> None:
    lot = Pass(BF16, 3)
    before = sum(lot.nodes())
    plain = 0
    for _ in range(60):
        rows = lot.go(3.0)
        plain += rows == 3
    assert sum(lot.nodes()) == 0 < before and plain > 50
    after = [lot.go(1.0) for _ in range(200)]
    assert sum(after[-100:]) > 100 * (3 + before / 2), "what was dear is tried again, and found to pay"


def test_now_and_then_a_pass_goes_without_drafts() -> None:
    """Or nobody would notice that those have become cheap."""
    lot = Pass(BF16, 3)
    lot.plan = live(BF16)
    rows = [lot.go(1.0) for _ in range(100)]
    assert [i for i, n in enumerate(rows) if n == 3] == [0, 1, 50, 99]


def test_a_request_that_wants_no_drafts_gets_none() -> None:
    lot = Pass(BF16, 3)
    lot.slots[1].drafter = None
    nodes = lot.nodes()
    assert nodes[1] == 0 < min(nodes[0], nodes[2])


def test_no_pass_is_wider_than_allowed() -> None:
    lot = Pass(BF16, 6)
    lot.know(live(BF16, most_rows=16))
    assert 0 < sum(lot.nodes()) <= 10
