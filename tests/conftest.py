"""What several test modules stand on: the bundled GGUF, and one that is not ours."""

from __future__ import annotations

import os
import signal

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # before numpy: its threads and llama.cpp's fight
os.environ.setdefault("GOMP_SPINCOUNT", "300000")
# Of torch: several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests, and the processes that they start, run on the bundled model, whatever is installed here.
os.environ["MODEL_PATH"] = "tiny-python"

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from tiny_llama import TinyConfig, TinyLlama, write_gguf

from model.base.gguf_file import requantize
from model.storage import facts

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background jobs, and their children, ignore it
ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "tiny-python.Q4_0.gguf"
FOREIGN = TinyConfig(vocab=1024, dim=192, layers=2, n_heads=6, n_kv_heads=2, ffn=320, context=512)


@dataclass(frozen=True)
class Foreign:
    """A llama model with random weights, as GGUF files and in torch, and its tokenizer."""

    f32: Path
    q8_0: Path
    torch_model: TinyLlama
    tokenizer: spm.SentencePieceProcessor


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' remembered fingerprints out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def bundled_gguf() -> Path:
    """The GGUF that ships with the project."""
    assert BUNDLED.exists(), f"{BUNDLED} is part of the repository"
    return BUNDLED


@pytest.fixture(scope="session")
def bundled_f32(bundled_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in F32, where texts are equal whatever the batches look like.

    Its heads fit.
    """
    target = tmp_path_factory.mktemp("f32") / "tiny-python.F32.gguf"
    requantize(bundled_gguf, target, "F32")
    return target


def random_llama(config: TinyConfig, seed: int = 0) -> TinyLlama:
    """A model in which each part counts; its logits spread as a trained one's do (by 3)."""
    torch.manual_seed(seed)
    model = TinyLlama(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # norms
                p.uniform_(0.5, 1.5)
            elif name == "token_embd.weight" and not config.tied:
                p.normal_()
            else:
                p.normal_(
                    std=(3.0 if name in ("output.weight", "token_embd.weight") else 1.0)
                    / p.shape[1] ** 0.5
                )
    return model


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """A model that is not ours: 1,024 pieces, grouped-query attention, F32 and Q8_0."""
    folder = tmp_path_factory.mktemp("foreign")
    lines = [
        line
        for name in ("argparse", "ast", "inspect", "typing")
        for line in _source(name).split("\n")
        if line
    ]
    with (folder / "tokenizer.model").open("wb") as f:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=f,
            model_type="bpe",
            vocab_size=FOREIGN.vocab,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            num_threads=1,
            minloglevel=2,
        )
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    model = random_llama(FOREIGN)
    f32, q8_0 = folder / "foreign-f32.gguf", folder / "foreign-q8_0.gguf"
    write_gguf(f32, model, tokenizer, "foreign")
    requantize(f32, q8_0, "Q8_0")
    return Foreign(f32, q8_0, model, tokenizer)


def _source(module: str) -> str:
    return (Path(os.__file__).parent / f"{module}.py").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def foreign_gguf(foreign: Foreign) -> Path:
    """The foreign model's F32 file."""
    return foreign.f32


@pytest.fixture(scope="session")
def foreign_gguf_q8(foreign: Foreign) -> Path:
    """The foreign model's Q8_0 file."""
    return foreign.q8_0
