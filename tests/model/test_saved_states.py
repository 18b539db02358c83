"""Sequences that move to host memory and back: nothing of them changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel

TOKENS = np.random.default_rng(0).integers(3, 900, 200).astype(np.int32)


@pytest.fixture(scope="module")
def base(bundled_gguf: Path) -> Iterator[LlamaBase]:
    model = LlamaModel(bundled_gguf)
    with LlamaBase(model, n_ctx=1024, n_threads=1, n_seq_max=4) as base:
        yield base
    model.close()


@pytest.mark.parametrize("fault", ["", "cut too short", "another sequence's"])
@pytest.mark.parametrize("cut", [0, 60])
def test_logits_behind_a_restored_sequence_are_bit_equal(
    base: LlamaBase, cut: int, fault: str
) -> None:
    base.clear()
    kept = len(TOKENS) - cut
    base.prefill(TOKENS, 0, 0)
    base.seq_rm(0, kept, -1)
    state = base.save_state(0)
    base.decode(TOKENS[:4], kept, 0)
    expected = base.logits(1).copy()

    # gone, and back under another id
    base.clear()
    if fault == "another sequence's":
        base.prefill(TOKENS[::-1].copy(), 0, 1)
        base.seq_rm(1, kept, -1)
        state = base.save_state(1)
        base.clear()
    assert base.restore_state(2, state)
    if fault == "cut too short":
        base.seq_rm(2, kept - 3, kept - 1)
    base.decode(TOKENS[:4], kept, 2)
    assert np.array_equal(base.logits(1), expected) != bool(fault)


def test_where_there_is_no_room_nothing_is_restored(base: LlamaBase) -> None:
    base.clear()
    base.prefill(TOKENS, 0, 0)
    state = base.save_state(0)
    for i in range(4):
        base.prefill(TOKENS, len(TOKENS) * (i + 1), 0)
    assert not base.restore_state(1, state)
    base.seq_rm(0, 100, -1)
    assert base.restore_state(1, state)
