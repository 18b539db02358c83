"""Many sequences with their own cells: shared prefixes are read once, sizes measured once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.storage.facts import recall
from model.training.distillation import parallelism
from model.training.distillation.parallelism import SIZES, Parallelism, measured_parallelism
from model.training.distillation.shared_prefixes import (
    SHORTEST,
    PrefixSharingBase,
    sequences_of,
)

HEADER = list(range(40, 60))
PROMPTS = [[*HEADER, *tail] for tail in ([7, 8, 9], [7, 8, 10, 11], [90] * 12, [90] * 12 + [3])]


def test_prompts_that_begin_alike_share_what_was_read(foreign_gguf: Path) -> None:
    """Logits are those of each prompt alone; a state in the wrong place would not pass."""
    model = LlamaModel(foreign_gguf)
    read: list[int] = []
    shared: PrefixSharingBase = sequences_of(
        model, 64, 4, n_threads=1, flash_attn=False, kv_type="f16"
    )
    with (
        shared as base,
        LlamaBase(model, n_ctx=64, n_threads=1) as plain,
        pytest.MonkeyPatch.context() as patch,
    ):
        decode = LlamaBase.decode

        def counted(self: LlamaBase, tokens: np.ndarray, *rest: object, **more: object) -> None:
            if self.n_seq_max > 1:
                read.append(len(tokens))
            decode(self, tokens, *rest, **more)  # type: ignore[arg-type]

        patch.setattr(LlamaBase, "decode", counted)
        for seq, prompt in enumerate(PROMPTS):
            base.prefill(np.array(prompt, np.int32), 0, seq)
        # The second finds what it shares with the first, the third what all share: the last copies.
        assert read == [23, 22, 2, 20, 12, 12, 1] and shared.n_shared == 20
        for seq, prompt in enumerate(PROMPTS):
            base.decode(np.array([5], np.int32), len(prompt), seq)
            plain.clear()
            plain.prefill(np.array(prompt, np.int32), 0, 0)
            plain.decode(np.array([5], np.int32), len(prompt), 0)
            assert np.allclose(base.logits(1), plain.logits(1), atol=1e-3)
            plain.clear()
            plain.prefill(np.array([6, *prompt[1:]], np.int32), 0, 0)
            plain.decode(np.array([5], np.int32), len(prompt), 0)
            assert not np.allclose(base.logits(1), plain.logits(1), atol=1e-2)
    assert len(HEADER) > SHORTEST
    model.close()


def test_sizes_are_measured_once_and_remembered(
    foreign_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LlamaModel(foreign_gguf)

    def measure(asked: int, flash_attn: bool | None, max_length: int = 64) -> Parallelism:
        return measured_parallelism(
            model, "print", asked=asked, max_length=max_length, n_threads=1,
            flash_attn=flash_attn, kv_type="f16",
        )  # fmt: skip

    found = measure(0, None)
    (kept,) = recall(parallelism.KIND).values()
    assert set(kept) == {"off", "on"} and set(kept["off"]) <= set(map(str, SIZES))
    with monkeypatch.context() as small:
        small.setattr(parallelism, "physical_memory", lambda: 1)
        assert measure(0, None, max_length=600).n == 1  # no memory for more
    monkeypatch.setattr(parallelism, "_Timer", None)  # a second measurement would fail
    assert measure(0, None) == measure(0, None, max_length=256) == found
    assert measure(8, True) == Parallelism(n=8, flash_attn=True)
    with pytest.raises(TypeError):
        measure(8, None)
    model.close()
