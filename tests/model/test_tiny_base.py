"""The tiny models of scripts/: their tokenizer and their arithmetic are llama.cpp's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import ROOT, Foreign
from tiny_llama import TinyLlama

from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.training.data.standard_library import standard_library

ODD = [
    " ",
    "\t",
    "  x",
    "x  ",
    "\t\tif  a :  b",
    "é",
    "日本語のコメント",
    "🎉 emoji 👩‍💻",
    "naïve — “quotes” …",
    "\u00a0\u200b",
    "<s>",
    "</s> <unk>",
    "<0x0A>",
    "▁x ▁ y",
    "0123456789",
    "\x01\x1f\x7f",
    "Ω≈ç√∫˜µ≤≥÷",
    "a" * 300,
    "=" * 200,
    "x = " + "(" * 50,
]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """1,000 different lines of held-out files, and odd ones."""
    files = standard_library(held=True)
    held = {line: None for _, text in files for line in text.split("\n") if line.strip()}
    found = [*ODD, *held][:1000]
    assert len(found) == 1000
    return found


def partings(
    model: LlamaModel, tokenizer: spm.SentencePieceProcessor, texts: list[str]
) -> list[str]:
    """Return the texts that become different ids by llama.cpp and SentencePiece, or change."""
    assert model.n_vocab == tokenizer.vocab_size()
    bad = []
    for text in texts:
        ids = model.tokenize(text, add_bos=False)
        if ids.tolist() != tokenizer.encode(text) or model.detokenize(ids) != text.replace(
            "▁", " "
        ):
            bad.append(text)
    return bad


def test_bundled_tokenizer_is_sentencepiece(bundled_gguf: Path, lines: list[str]) -> None:
    tokenizer = spm.SentencePieceProcessor(
        model_file=str(ROOT / "models" / "tiny-python.tokenizer.model")
    )
    model = LlamaModel(bundled_gguf)
    assert partings(model, tokenizer, lines) == []
    assert partings(model, tokenizer, ["\n".join(lines)]) == []
    model.close()


def test_foreign_tokenizer_is_sentencepiece(foreign: Foreign, lines: list[str]) -> None:
    model = LlamaModel(foreign.f32)
    assert partings(model, foreign.tokenizer, lines) == []
    model.close()


def test_another_tokenizer_is_noticed(
    foreign: Foreign, bundled_gguf: Path, lines: list[str]
) -> None:
    """Negative control: the bundled model's ids for these lines are not the foreign tokenizer's."""
    model = LlamaModel(bundled_gguf)
    same = sum(
        model.tokenize(line, add_bos=False).tolist() == foreign.tokenizer.encode(line)
        for line in lines
    )
    assert same < 100
    model.close()


def llama_logits(path: Path, tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> torch.Tensor:
    """Return llama.cpp's logits (T, V), with its cache in F32 and plain attention."""
    model = LlamaModel(path)
    with LlamaBase(model, n_ctx=512, n_threads=2, flash_attn=False, kv_type="f32") as base:
        base.decode(tokens, 0, 0, outputs=True)
        logits = torch.from_numpy(base.logits(len(tokens)).copy())
    model.close()
    return logits


@torch.no_grad()
def logit_errors(model: TinyLlama, path: Path) -> list[float]:
    """Return the largest difference on each of two random texts of 300 tokens."""
    errors = []
    for seed in range(2):
        tokens = np.random.default_rng(seed).integers(0, model.c.vocab, 300).astype(np.int32)
        expected = model(torch.from_numpy(tokens).long()[None])[0]
        assert 2 < expected.std() < 5  # as in a trained model
        errors.append((llama_logits(path, tokens) - expected).abs().max().item())
    return errors


def test_torch_and_llama_agree_on_the_logits(foreign: Foreign) -> None:
    assert max(logit_errors(foreign.torch_model, foreign.f32)) < 1e-3


def test_a_wrong_angle_is_noticed(foreign: Foreign) -> None:
    """Negative control: a model whose positions turn 1 % slower parts by more than the bound."""
    slow = TinyLlama(foreign.torch_model.c)
    slow.load_state_dict(foreign.torch_model.state_dict())
    t, half = slow.get_buffer("cos").shape
    angle = torch.outer(torch.arange(t).float(), 10_100.0 ** (-torch.arange(half) / half))
    slow.cos, slow.sin = angle.cos(), angle.sin()
    assert min(logit_errors(slow, foreign.f32)) > 1e-2
