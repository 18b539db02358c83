"""The step on a fake base model whose logits hang on every token that a row sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_base import FakeBase

from model.decoding.drafting import ConstantDrafter, RandomDrafter
from model.decoding.planning import FixedPlan
from model.decoding.sampling import Sampler, SamplingParams
from model.decoding.slot import Slot
from model.decoding.step import prefill, step
from model.trees.tree import Tree

TREES = [Tree.chain(3), Tree.product([3, 2, 2]), Tree([(0,), (1,), (1, 0), (1, 0, 0), (2,)]), Tree.product([8])]


class Oracle:
    """Drafts the fake model's own continuation (with a sampler's draws) at a chosen rank, noise at the others."""

    def __init__(self, base: FakeBase, slot: Slot, tree: Tree, miss: float) -> None:
        self.base, self.slot, self.tree, self.miss = base, slot, tree, miss
        self.shape = (tree.max_depth, tree.n_ranks)
        self.rng = np.random.default_rng(1)

    def draft(self, hidden: npt.NDArray[np.float32], roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        heads, ranks = self.shape
        out = self.rng.integers(0, self.base.n_vocab, (heads, ranks), dtype=np.int32)
        history = list(self.slot.tokens)
        path = self.tree.paths[self.rng.choice(self.tree.leaves)]
        for k, rank in enumerate(path):
            index = len(history) - self.slot.prompt_length
            token = self.slot.sampler.choose(self.base.logits_of(history), index)
            history.append(token)
            if self.rng.random() >= self.miss:
                out[k, rank] = token
        return [tree.fill(out) for tree in trees]


def plain(base: FakeBase, prompt: list[int], n: int, params: SamplingParams) -> list[int]:
    sampler, tokens = Sampler(params, prompt), list(prompt)
    for i in range(n):
        tokens.append(sampler.choose(base.logits_of(tokens), i))
        sampler.take(tokens[-1])
    return tokens


class Knowing:
    """Drafts a text that is known, now and then wrongly, each guess at a rank by chance."""

    def __init__(self, text: list[int], so_far: list[int], tree: Tree, miss: float = 0.2, seed: int = 1) -> None:
        self.text, self.so_far, self.miss = text, so_far, miss
        self.shape, self.rng = (tree.max_depth, tree.n_ranks), np.random.default_rng(seed)

    def draft(self, hidden: npt.NDArray[np.float32], roots: Sequence[int], trees: Sequence[Tree]) -> list[list[int]]:
        out = self.rng.integers(0, 50, self.shape, dtype=np.int32)
        for depth, token in enumerate(self.text[len(self.so_far) : len(self.so_far) + self.shape[0]]):
            if self.rng.random() >= self.miss:
                out[depth, self.rng.integers(self.shape[1])] = token
        return [tree.fill(out) for tree in trees]


def run(
    base: FakeBase, tree: Tree, params: SamplingParams, n: int = 60, miss: float = 0.2, look_inside: bool = True
) -> Slot:
    slot = Slot([1, 2, 3], 3 + n, Sampler(params), lambda t: False, lanes=range(len(tree.leaves)))
    slot.drafter = Oracle(base, slot, tree, miss)
    prefill(base, slot)
    while not slot.finished:
        step(base, [slot], FixedPlan(tree))
        for lane in slot.lanes if look_inside else ():
            assert base.text_of(lane) == slot.tokens[:-1], "every lane holds the committed text and nothing else"
    return slot


@pytest.mark.parametrize("tree", TREES, ids=repr)
@pytest.mark.parametrize("own_context", [True, False])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.7, seed=3), SamplingParams(1.2, top_k=9, top_p=0.8, seed=4)], ids=repr
)
def test_text_is_the_plain_text(tree: Tree, params: SamplingParams, own_context: bool) -> None:
    base = FakeBase(n_seq_max=len(tree.leaves) if own_context else 64)
    slot = run(base, tree, params)
    assert slot.tokens == plain(base, [1, 2, 3], 60, params)
    assert slot.stats.acceptance_length > 1.4, "the oracle's drafts must be accepted, or nothing was tested"
    assert tree.max_depth == 1 or slot.stats.accepted[1] > 3


EXTRAS = {
    "min_p": SamplingParams(1.3, min_p=0.2, seed=5),
    "presence": SamplingParams(0.0, presence_penalty=1.5),
    "frequency": SamplingParams(0.9, frequency_penalty=0.8, seed=6),
    "repeat": SamplingParams(0.0, repeat_penalty=1.8),
    "bias": SamplingParams(1.0, logit_bias={7: 3.0, 8: -1e6}, seed=7),
    "all": SamplingParams(0.8, 20, 0.9, 8, 0.05, 0.7, 0.4, 1.3, {3: 2.0}),
}


def drafted(base: FakeBase, tree: Tree, params: SamplingParams, text: list[int], prompt: list[int]) -> Slot:
    slot = Slot(list(prompt), len(text), Sampler(params, prompt), lambda t: False, lanes=range(len(tree.leaves)))
    slot.drafter = Knowing(text, slot.tokens, tree)
    prefill(base, slot)
    while not slot.finished:
        step(base, [slot], FixedPlan(tree))
    return slot


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("tree", [Tree.chain(3), Tree.product([3, 2])], ids=repr)
def test_every_option_leaves_the_plain_text(name: str, tree: Tree) -> None:
    base, prompt = FakeBase(n_vocab=12), [1, 2, 3]
    text = plain(base, prompt, 80, EXTRAS[name])
    slot = drafted(base, tree, EXTRAS[name], text, prompt)
    assert slot.tokens == text
    assert slot.stats.acceptance_length > 1.4, "drafts must be accepted, or nothing was tested"
    assert text != plain(base, prompt, 80, SamplingParams(EXTRAS[name].temperature, seed=EXTRAS[name].seed))


def test_negative_control_a_sampler_that_does_not_follow_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tree, params, prompt = FakeBase(n_vocab=12), Tree.product([3, 2]), EXTRAS["frequency"], [1, 2, 3]
    text = plain(base, prompt, 80, params)
    monkeypatch.setattr(Sampler, "take", lambda self, token: None)
    assert drafted(base, tree, params, text, prompt).tokens != text


@pytest.mark.parametrize("broken", ["siblings", "no_roll_back", "second_best"])
def test_negative_controls(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above must notice a wrong mask, stale cells and a wrong acceptance."""
    base, tree, params = FakeBase(), Tree.product([3, 2, 2]), SamplingParams()
    if broken == "siblings":
        place = base.place

        def all_lanes(offset: int, *rows: Any) -> int:
            end = place(offset, *rows)
            base._batch[offset:end] = [(p, t, set(range(12))) for p, t, _ in base._batch[offset:end]]
            return end

        monkeypatch.setattr(base, "place", all_lanes)
    elif broken == "no_roll_back":
        monkeypatch.setattr(base, "seq_rm", lambda *a: None)
    else:
        monkeypatch.setattr(Sampler, "choose", lambda self, logits, i: int(np.argsort(logits)[-2]))

    def check() -> None:
        slot, tokens = run(base, tree, params, look_inside=False), [1, 2, 3]
        while len(tokens) < len(slot.tokens):
            tokens.append(int(base.logits_of(tokens).argmax()))
        assert slot.tokens == tokens

    with pytest.raises(AssertionError):
        check()


def test_many_slots_share_a_batch_and_stay_apart() -> None:
    base, trees = FakeBase(), Tree.product([2, 2])
    slots = []
    for i in range(3):
        lanes = range(4 * i, 4 * i + 4)
        slot = Slot([5 + i, 9], 2 + 20 + 7 * i, Sampler(SamplingParams()), lambda t: False, lanes=lanes)
        slot.drafter = Oracle(base, slot, trees, 0.3)
        prefill(base, slot)
        slots.append(slot)
    running = list(slots)
    while running:
        step(base, running, FixedPlan(trees))
        running = [s for s in running if not s.finished]
    for i, slot in enumerate(slots):
        assert slot.tokens == plain(base, [5 + i, 9], 20 + 7 * i, SamplingParams())


def test_slots_with_one_drafter_are_drafted_in_one_call() -> None:
    calls = []

    class Counting(RandomDrafter):
        def draft(
            self, hidden: npt.NDArray[np.float32], roots: Sequence[int], trees: Sequence[Tree]
        ) -> list[list[int]]:
            calls.append((len(hidden), list(roots)))
            return super().draft(hidden, roots, trees)

    base, drafter = FakeBase(), Counting(50)
    slots = [Slot([i, 7], 12, Sampler(SamplingParams()), lambda t: False, drafter, range(i, i + 1)) for i in range(3)]
    for slot in slots:
        prefill(base, slot)
    step(base, slots, FixedPlan(Tree.chain(2)))
    step(base, slots, FixedPlan(Tree.chain(2)))
    roots = [slot.tokens[2] for slot in slots]
    assert calls == [(3, roots)], "no states before the first step, one call for all three slots in the second"


@pytest.mark.parametrize("limit", range(4, 12))
def test_a_full_context_ends_the_text_where_plain_decoding_would(limit: int) -> None:
    base, tree = FakeBase(), Tree.product([2, 2, 2])
    slot = run(base, tree, SamplingParams(), n=limit - 3, miss=0.0)
    assert slot.tokens == plain(base, [1, 2, 3], limit - 3, SamplingParams())


def test_an_end_token_inside_an_accepted_path_ends_the_text_there() -> None:
    base = FakeBase()
    text = plain(base, [1, 2, 3], 12, SamplingParams())
    end = text[8]
    slot = Slot([1, 2, 3], 99, Sampler(SamplingParams()), lambda t: t == end, lanes=range(1))
    slot.drafter = Oracle(base, slot, Tree.chain(4), 0.0)
    prefill(base, slot)
    while not slot.finished:
        step(base, [slot], FixedPlan(Tree.chain(4)))
    assert slot.tokens == text[: text.index(end, 3) + 1]
    assert base.text_of(0) == slot.tokens[:-1]


def test_statistics_count_nodes_by_depth() -> None:
    base = FakeBase()
    slot = Slot([1, 2], 42, Sampler(SamplingParams()), lambda t: False, ConstantDrafter(0))
    prefill(base, slot)
    while not slot.finished:
        step(base, [slot], FixedPlan(Tree.chain(3)))
    s = slot.stats
    assert s.emitted == 40 and s.steps <= 40
    assert s.drafted == [s.steps - 1] * 3 and s.head_steps == {3: s.steps - 1}
    assert s.emitted == s.steps + sum(s.accepted), "but for the last step, which may be cut off by the limit"


def test_a_slot_that_is_stepped_alone_leaves_the_others_cells_alone() -> None:
    base, tree, slots = FakeBase(n_seq_max=8), Tree.product([2, 2]), list[Slot]()
    for i in range(2):
        slot = Slot([5 + i, 9, 4], 40, Sampler(SamplingParams()), lambda t: False, lanes=range(4 * i, 4 * i + 4))
        slot.drafter = Oracle(base, slot, tree, 0.5)
        prefill(base, slot)
        slots.append(slot)
    before = base.text_of(4)
    for _ in range(5):
        step(base, slots[:1], FixedPlan(tree))
    assert base.text_of(4) == before == [6, 9]
