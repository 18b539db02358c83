"""The base model through real llama.cpp: batches, trees, states, roll-back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from model.base import lm_head
from model.base.chat import ChatTemplate
from model.base.gguf_file import GGUFFile
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.base.lm_head import TOLERANCE, check_lm_head, lm_head_error
from model.base.prompt import encode_prompt
from model.decoding.tree_cache import tree_rows
from model.errors import ContextError, ModelFileError, UsageError
from model.storage import facts
from model.trees.tree import Tree

PROMPT = "import os\n\n\ndef main(argv):\n    return "


@pytest.fixture(scope="module")
def model(bundled_gguf: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(bundled_gguf)
    yield model
    model.close()


def context(model: LlamaModel, **more: int) -> LlamaBase:
    return LlamaBase(model, n_ctx=512, n_threads=2, **more)  # type: ignore[arg-type]


def test_text_goes_there_and_back(model: LlamaModel) -> None:
    tokens = model.tokenize(PROMPT)
    assert tokens[0] == model.bos and model.detokenize(tokens) == PROMPT
    text = "naïve → 'déjà vu' 𝄞\n\tx"
    assert model.detokenize(model.tokenize(text, add_bos=False)) == text


def test_a_conversation_has_one_bos(model: LlamaModel) -> None:
    """As the fake vocabulary of tests/unit/test_prompt.py says, with llama.cpp's tokenizer."""
    messages = [{"role": "user", "content": "hi"}]
    for template in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
        tokens = encode_prompt(model, messages, ChatTemplate(template, bos="<s>"))
        assert tokens.count(model.bos) == 1 and tokens[0] == model.bos
    assert encode_prompt(model, PROMPT) == model.tokenize(PROMPT).tolist()
    twice = encode_prompt(model, "<s>hi", parse_special=True)
    assert twice[:2] == [model.bos, model.bos], "the test's mark is the vocabulary's"


def test_states_times_lm_head_are_the_logits(model: LlamaModel, bundled_gguf: Path) -> None:
    check_lm_head(model, GGUFFile(bundled_gguf), 2)
    file = GGUFFile(bundled_gguf)
    tokens = model.tokenize(PROMPT)
    with context(model, embeddings=True) as base:
        base.decode(tokens, 0, 0)
        hidden = base.hidden(len(tokens)).copy()
        logits = base.logits(len(tokens)).copy()
    assert lm_head_error(file, hidden, logits) < TOLERANCE / 2
    file.logit_scale = 0.5  # argmaxes stay, logits don't
    assert lm_head_error(file, hidden, logits) > TOLERANCE
    file.logit_scale = 1.0
    file.soft_cap = float(np.abs(logits).max() / 2)
    assert lm_head_error(file, hidden, logits) > TOLERANCE


def test_an_lm_head_that_is_not_understood_is_refused(
    model: LlamaModel, bundled_gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(facts, "folder", lambda: tmp_path)
    file = GGUFFile(bundled_gguf)
    file.logit_scale = 2.0
    with pytest.raises(ModelFileError, match="'llama' models"):
        check_lm_head(model, file, 2)
    file.logit_scale = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(lm_head, "lm_head_error", lambda *_: float("nan"))
        with pytest.raises(ModelFileError, match=r"differs from llama\.cpp's logits by nan"):
            check_lm_head(model, file, 2)
    check_lm_head(model, file, 2)
    assert len(facts.recall("lm_heads")) == 1
    file.soft_cap = 0.5  # the same file, understood in another way, is checked anew
    with pytest.raises(ModelFileError, match="'llama' models"):
        check_lm_head(model, file, 2)


def test_long_tokens_and_small_buffers(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into the first buffer is asked for again with llama.cpp's size."""
    long = b"x" * 2000

    def piece(vocab: Any, token: int, buffer: Any, size: int, *_: Any) -> int:
        if size < len(long):
            return -len(long)
        buffer[: len(long)] = long
        return len(long)

    def tokenize(vocab: Any, data: bytes, n: int, out: Any, size: int, *_: Any) -> int:
        if size < 100:
            return -100 if data != b"huge" else -(2**31)
        out[99] = 7
        return 100

    monkeypatch.setattr(llama_cpp, "llama_token_to_piece", piece)
    monkeypatch.setattr(llama_cpp, "llama_tokenize", tokenize)
    monkeypatch.setattr(model, "_pieces", {})
    assert model.piece(5) == long
    assert model.tokenize("short")[99] == 7
    with pytest.raises(ModelFileError, match="4 bytes"):
        model.tokenize("huge")


def test_half_a_surrogate_pair_is_a_question_mark(model: LlamaModel) -> None:
    assert model.detokenize(model.tokenize("a\udc80b", add_bos=False)) == "a?b"


def test_a_failed_batch_leaves_no_trace_in_the_next(model: LlamaModel) -> None:
    with LlamaBase(model, n_ctx=256, n_threads=1) as base:
        with pytest.raises(ContextError):
            base.decode(np.array([1, 500, -5], np.int32), 0, 0, outputs=False)
        base.clear()
        tree = Tree.chain(2)
        base.decode_placed(base.place(0, [1, 500, 501], tree.depth_list, tree_rows(tree, range(1))))
        assert np.isfinite(base.logits(3)).all()
        assert (base.logits(3).std(axis=1) > 0.1).all()


def test_prefill_and_plain_batches_agree(model: LlamaModel) -> None:
    tokens = model.tokenize(PROMPT)
    with context(model, embeddings=True) as a, context(model) as b:
        a.prefill(tokens[:-1], 0, 0)
        a.want_states(True)  # prefill goes without
        a.decode(tokens[-1:], len(tokens) - 1, 0)
        b.prefill(tokens[:-1], 0, 0)
        b.decode(tokens[-1:], len(tokens) - 1, 0)
        np.testing.assert_array_equal(a.logits(1), b.logits(1))
        assert np.isfinite(a.hidden(1)).all() and a.hidden(1).std() > 0.1


def tree_logits(model: LlamaModel, tree: Tree, tokens: list[int]) -> np.ndarray:
    prompt = model.tokenize(PROMPT)
    with context(model, n_seq_max=len(tree.leaves), embeddings=True) as base:
        base.prefill(prompt, 0, 0)
        seq_ids = range(len(tree.leaves))
        for seq_id in seq_ids[1:]:
            base.seq_cp(0, seq_id, 0, len(prompt))
        rows = tree_rows(tree, seq_ids)
        n = base.place(0, tokens, [len(prompt) + depth for depth in tree.depth_list], rows)
        base.decode_placed(n)
        return base.logits(n).copy()


def test_every_node_of_a_tree_sees_its_own_path_only(model: LlamaModel) -> None:
    tree = Tree.product([3, 2])
    rng = np.random.default_rng(0)
    tokens = rng.integers(300, model.n_vocab, len(tree)).tolist()
    logits = tree_logits(model, tree, tokens)
    prompt = model.tokenize(PROMPT)
    worst = 0.0
    with context(model) as base:
        for node in range(len(tree)):
            path = list[int]()
            at = node
            while at >= 0:
                path.insert(0, tokens[at])
                at = int(tree.parents[at])
            base.clear()
            base.prefill(prompt, 0, 0)
            base.decode(np.array(path, np.int32), len(prompt), 0)
            worst = max(worst, float(np.abs(base.logits(1)[0] - logits[node]).max()))
    other = tree_logits(model, tree, [tokens[0], *tokens[2:], tokens[1]])
    seen = float(np.abs(other[-1] - logits[-1]).max())
    assert worst < 0.1 * seen, (
        "a path decoded alone must agree far better than one with another token in it"
    )


def test_roll_back_leaves_no_trace(model: LlamaModel) -> None:
    tokens = model.tokenize(PROMPT)
    with context(model) as base:
        base.prefill(tokens, 0, 0)
        base.decode(np.array([500], np.int32), len(tokens), 0)
        expected = base.logits(1).copy()
        base.seq_rm(0, len(tokens), -1)
        base.decode(np.array([700, 701, 702], np.int32), len(tokens), 0)
        assert not np.array_equal(base.logits(1), expected)
        base.seq_rm(0, len(tokens), -1)
        base.decode(np.array([500], np.int32), len(tokens), 0)
        np.testing.assert_array_equal(base.logits(1), expected)


def test_a_full_cache_is_one_clear_error(model: LlamaModel) -> None:
    with LlamaBase(model, n_ctx=256, n_threads=2) as base, pytest.raises(ContextError, match="256"):
        base.prefill(np.full(base.n_ctx + 1, 500, np.int32), 0, 0)


def test_bad_arguments_and_files(model: LlamaModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'q9'"):
        LlamaBase(model, n_ctx=64, n_threads=1, kv_type="q9")
    with pytest.raises(UsageError, match="'q8_0' needs flash attention"):
        LlamaBase(model, n_ctx=64, n_threads=1, kv_type="q8_0", flash_attn=False)
    with pytest.raises(UsageError, match="257 sequences"):
        LlamaBase(model, n_ctx=64, n_threads=1, n_seq_max=257)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelFileError, match=r"x\.gguf"):
        LlamaModel(tmp_path / "x.gguf")
