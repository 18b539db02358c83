"""States that are read without the LM head are those that come with it, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.base import state_reader
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.base.state_reader import StateReader, reads_states

TOKENS = np.random.default_rng(0).integers(3, 900, 96).astype(np.int32)
OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_batch": 32, "n_seq_max": 2}


@pytest.fixture(scope="module")
def model(bundled_gguf: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(bundled_gguf)
    yield model
    model.close()


def states_of(base: LlamaBase) -> np.ndarray[Any, Any]:
    """Return the states of all tokens, in batches of two sequences."""
    blocks = []
    for start in range(0, len(TOKENS), 32):
        at = np.arange(start // 2, start // 2 + 16, dtype=np.int32)
        pos = np.concatenate([at, at])
        seq = np.repeat(np.array([0, 1], np.int32), 16)
        base.decode(TOKENS[start : start + 32], pos, seq, outputs=True)
        blocks.append(base.hidden(32).copy())
    return np.concatenate(blocks)


@pytest.mark.parametrize("fault", [False, True])
def test_states_are_bit_equal_and_the_cache_is_complete(model: LlamaModel, fault: bool) -> None:
    """The control reads another node of the same shape."""
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(state_reader, "FINAL_NORM", b"norm")
        with LlamaBase(model, embeddings=True, **OPTIONS) as base:
            expected = states_of(base)
        with StateReader(model, **OPTIONS) as reader:
            assert np.array_equal(states_of(reader), expected) != fault
        assert reads_states(model, 1) != fault


def test_a_graph_without_such_a_node_is_noticed(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_reader, "FINAL_NORM", b"no_such_node")
    assert not reads_states(model, 1)
