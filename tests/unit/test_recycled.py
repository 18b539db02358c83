"""Recycled continuations: what the model said behind the same tokens, kept within bounds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from model.decoding.drafters.drafter import (
    BIN_PRIORS,
    RECYCLED,
    likeliest_chain,
    ranked_bins,
)
from model.decoding.drafters.recycled import (
    ENTRY_BYTES,
    PRIORS,
    ContinuationMemory,
    RecycledDrafter,
)
from model.loaded_model import new_drafters
from model.trees.likeliest import KEPT, likeliest


def logits(n_vocab: int = 20, **values: float) -> npt.NDArray[np.float32]:
    """Logits far below 0 but for tokens by name: t7=2.0."""
    out = np.full(n_vocab, -30.0, np.float32)
    for name, value in values.items():
        out[int(name[1:])] = value
    return out


def test_the_likeliest_come_first_with_their_shares() -> None:
    tokens, shares = likeliest(logits(t3=1.0, t7=2.0, t9=1.5, t11=0.5, t12=0.4, t4=-5.0))
    assert tokens == [7, 9, 3, 11] and len(tokens) == KEPT
    whole = np.exp([2.0, 1.5, 1.0, 0.5, 0.4])
    assert shares == pytest.approx((whole / whole.sum())[:4], rel=1e-5)


def test_logits_that_are_no_numbers_guess_nothing() -> None:
    assert likeliest(np.full(20, np.nan, np.float32)) == ([], [])
    tokens, shares = likeliest(np.full(20, -np.inf, np.float32))
    assert len(tokens) == len(shares) == 0
    memory = ContinuationMemory(1)
    memory.keep(1, 2, np.full(20, np.nan, np.float32))
    assert likeliest_chain(RecycledDrafter([1, 2], memory), 3) == []


def test_shares_are_near_the_probabilities_where_the_model_is_sure() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = rng.standard_normal(5000).astype(np.float32)
        row[17] = 12.0
        [token, *_], [share, *_] = likeliest(row)
        exact = 1 / np.exp(row - 12.0).sum()
        assert token == 17 and exact <= share <= 1.1 * exact


def test_it_goes_on_as_the_model_did_before() -> None:
    memory = ContinuationMemory(1)
    tokens = [1, 2]
    drafter = RecycledDrafter(tokens, memory)
    assert likeliest_chain(drafter, 5) == []
    drafter.observe([1, 2, 3], [0, 1], np.stack([logits(t3=5.0), logits(t4=5.0)]))
    assert likeliest_chain(drafter, 5) == [3, 4]
    tokens += [9, 2]
    assert [token for token, _ in drafter.guesses((9, 2))] == [3], "behind one token"
    kinds = [drafter.guesses(cursor)[0][1] for cursor in ((1, 2), (9, 2))]
    assert PRIORS[kinds[0]] > PRIORS[kinds[1]], "two tokens that agree say more than one"
    drafter.observe([9, 2], [0], logits(t8=5.0)[None])
    assert drafter.guesses((9, 2))[0][0] == 8
    assert drafter.guesses((1, 2))[0][0] == 3, "each context has its own"


def test_rows_are_those_of_the_accepted_nodes() -> None:
    memory = ContinuationMemory(1)
    drafter = RecycledDrafter([], memory)
    rows = np.stack([logits(t1=5.0), logits(t2=5.0), logits(t3=5.0)])
    drafter.observe([-1, 10, 12], [0, 2], rows)
    assert memory.find(10, 12)[0][0] == 3
    assert len(memory) == 1, "there is no token before the first"
    assert memory.find(99, 10)[0][0] == 1


def test_one_memory_is_shared_or_not() -> None:
    shared = ContinuationMemory(1)
    first, second = RecycledDrafter([1, 2], shared), RecycledDrafter([1, 2], shared)
    alone = RecycledDrafter([1, 2], ContinuationMemory(1))
    first.observe([1, 2], [0], logits(t3=5.0)[None])
    assert likeliest_chain(second, 1) == [3] and likeliest_chain(alone, 1) == []


def test_what_was_taught_is_forgotten_when_asked() -> None:
    drafters = new_drafters(None, {RECYCLED})
    drafter = drafters.continuations[RECYCLED]([1, 2])
    drafter.observe([1, 2], [0], logits(t3=5.0)[None])
    assert likeliest_chain(drafter, 1) == [3]
    drafters.forget()
    assert likeliest_chain(drafter, 1) == []
    assert not new_drafters(None, {RECYCLED}, memory_mb=0).continuations


def test_memory_is_bounded_and_the_oldest_goes() -> None:
    memory = ContinuationMemory(100 * ENTRY_BYTES / 2**20)
    for token in range(1000):
        memory.keep(token, token + 1, logits(t3=5.0))
    assert len(memory) == 100
    assert memory.find(999, 1000) and not memory.find(5, 6)


def test_an_entry_takes_about_what_it_is_counted_for() -> None:
    import tracemalloc

    memory = ContinuationMemory(64)
    row = logits(t3=5.0, t4=4.0, t5=4.0, t6=4.0)
    tracemalloc.start()
    for token in range(4000):
        memory.keep(1000 + token, 2000 + token, row)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 < size / 4000 / ENTRY_BYTES < 1.3, size / 4000


def test_kinds_hold_the_rank_and_the_probability() -> None:
    kinds = ranked_bins([0.99, 0.5, 0.04])
    assert [BIN_PRIORS[kind] for kind in kinds] == pytest.approx([0.95, 0.55, 0.05])
    assert ranked_bins([0.5])[0] != kinds[1], "the best guess and a further one are two kinds"
    assert ranked_bins([]) == []
    assert max(ranked_bins([1.0, 1.0])) < len(BIN_PRIORS)
