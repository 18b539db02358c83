"""The benchmark model: it behaves as the small one, heads guess alike, no new token comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from conftest import FOREIGN, Foreign, random_llama
from tiny_llama import write_gguf

from benchmarks import scale_up
from model.base import growth
from model.base.gguf_file import GGUFFile, requantize
from model.base.growth import grow
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.base.llama_shape import Shape, shape_of
from model.decoding.sampling import Sampler, SamplingParams
from model.errors import HeadsError, ModelFileError, UsageError
from model.evaluation import scaled_model
from model.evaluation.scaled_model import Scaled, build, final_stream, grow_heads
from model.heads.files import base_facts, load_heads, new_heads, save_heads
from model.heads.hydra_drafter import drafter_for
from model.heads.known_heads import HEADS_FOLDER
from model.heads.medusa import HeadsConfig
from model.loaded_model import LoadedModel, LoadOptions
from model.planning.prompt_files import PYTHON_TRIALS, read_prompt_file
from model.training.data.standard_library import standard_library
from model.trees.tree import Tree

Float32Array = npt.NDArray[np.float32]
SMALL = Shape(dim=448, layers=8, heads=12, kv_heads=6, head_dim=96, ffn=1024, vocab=4608)
VOCAB = 4096  # of the bundled model
BOUND = 1e-3  # of the logits in F32; 1e-5 is what they differ by
HEADS = HEADS_FOLDER / "tiny-python"
PLACES = growth.places
PROMPTS = read_prompt_file(PYTHON_TRIALS)[:3]


@dataclass(frozen=True)
class Grown:
    """The bundled model in F32, and grown."""

    base: GGUFFile
    logits: Float32Array  # the base model's on random tokens
    stream: float
    scaled: Scaled


@pytest.fixture(scope="module")
def grown(bundled_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    folder = tmp_path_factory.mktemp("scaled")
    requantize(bundled_gguf, folder / "base.gguf", "F32")
    base = GGUFFile(folder / "base.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scaled_model.SHAPES, "small", SMALL)
        scaled = build("small", "F32", base=base.path, heads=HEADS, out=folder)
    return Grown(base, random_logits(base.path, VOCAB), final_stream(base), scaled)


def open_context(model: LlamaModel) -> LlamaBase:
    return LlamaBase(
        model, n_ctx=512, n_threads=1, embeddings=True, flash_attn=False, kv_type="f32"
    )


def outputs(path: Path, tokens: npt.NDArray[np.int32]) -> tuple[Float32Array, Float32Array]:
    """Return the logits (T, V) and the states (T, D) of a text."""
    model = LlamaModel(path)
    with open_context(model) as base:
        base.decode(tokens, 0, 0)
        result = base.logits(len(tokens)).copy(), base.hidden(len(tokens)).copy()
    model.close()
    return result


def random_logits(path: Path, vocab: int) -> Float32Array:
    """Return the first `vocab` tokens' logits on 200 random ones of them."""
    tokens = np.random.default_rng(0).integers(0, vocab, 200).astype(np.int32)
    return outputs(path, tokens)[0][:, :vocab]


def text_tokens(path: Path) -> npt.NDArray[np.int32]:
    model = LlamaModel(path)
    tokens = np.concatenate([model.tokenize(prompt) for prompt in PROMPTS])[:400]
    model.close()
    return tokens


def greedy(path: Path, prompt: str, n: int) -> list[int]:
    model, tokens = LlamaModel(path), list[int]()
    with open_context(model) as base:
        batch, at = model.tokenize(prompt)[-400:], 0
        for _ in range(n):
            base.decode(batch, at, 0)
            at += len(batch)
            tokens.append(int(base.logits(len(batch))[-1].argmax()))
            batch = np.array(tokens[-1:], np.int32)
    model.close()
    return tokens


def filler_share(logits: Float32Array, temperature: float = 0.8) -> float:
    """Return the largest probability of all new tokens together."""
    shares = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float64) / temperature)
    return float((shares[:, VOCAB:].sum(1) / shares.sum(1)).max())


def test_texts_are_equal(grown: Grown) -> None:
    for prompt in PROMPTS:
        tokens = greedy(grown.base.path, prompt, 48)
        assert len(set(tokens)) > 5 and greedy(grown.scaled.model, prompt, 48) == tokens


def test_logits_are_equal_and_new_tokens_never_chosen(grown: Grown) -> None:
    assert np.abs(random_logits(grown.scaled.model, VOCAB) - grown.logits).max() < BOUND
    tokens = text_tokens(grown.base.path)
    (ours, states), (logits, wide) = (
        outputs(grown.base.path, tokens),
        outputs(grown.scaled.model, tokens),
    )
    assert logits.shape == (len(tokens), SMALL.vocab) and wide.shape == (len(tokens), SMALL.dim)
    assert np.abs(logits[:, :VOCAB] - ours).max() < BOUND
    assert np.abs(wide[:, : grown.base.n_embd] - states).max() < BOUND
    assert (
        not wide[:, grown.base.n_embd : -1].any()
        and 0.3 < wide[:, -1].min() <= wide[:, -1].max() < 3
    )
    assert logits[:, VOCAB:].max() < -30 and filler_share(logits) < 1e-9
    sampler = Sampler(SamplingParams(temperature=0.8, seed=1))
    chosen = [
        (sampler.choose(a, i), sampler.choose(b, i))
        for i, (a, b) in enumerate(zip(ours, logits, strict=True))
    ]
    assert np.mean([a == b for a, b in chosen]) > 0.99 and max(b for _, b in chosen) < VOCAB


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("norm_factor", lambda small, large: 1.0),
        ("query_factor", lambda small, large: 1.0),
        (
            "grown_epsilon",
            lambda small, large, eps: eps * small.dim / large.dim,
        ),  # the constant not compensated for
        ("spare_constant", lambda small, eps: 0.5),
        ("places", lambda small, large: PLACES(small, replace(large, kv_heads=large.heads))),
    ],
)
def test_wrong_growth_is_noticed(
    name: str,
    wrong: Callable[..., Any],
    grown: Grown,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: each factor is needed for the logits to be equal."""
    if name == "spare_constant":  # in the file alone, not in the norms
        monkeypatch.setattr(
            growth, "grown_epsilon", lambda small, large, eps: 1e-5 * small.dim / large.dim / 2
        )
    monkeypatch.setattr(growth, name, wrong)
    grow(grown.base, SMALL, tmp_path / "wrong.gguf", name="wrong", stream=grown.stream, f32=True)
    assert np.abs(random_logits(tmp_path / "wrong.gguf", VOCAB) - grown.logits).max() > 5 * BOUND


def test_weak_fillers_are_noticed(
    grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: with logits near −1 the new tokens would be chosen."""
    monkeypatch.setattr(growth, "FILLER_WEIGHT", -1.0)
    grow(grown.base, SMALL, tmp_path / "weak.gguf", name="weak", stream=grown.stream, f32=True)
    assert filler_share(outputs(tmp_path / "weak.gguf", text_tokens(grown.base.path))[0]) > 1e-3


def test_foreign_models_grow_too(foreign: Foreign, tmp_path: Path) -> None:
    """Grouped-query attention with three queries to a key; an LM head tied to the embeddings."""
    for tied in (False, True):
        path = tmp_path / f"{tied}.gguf"
        large = Shape(dim=256, layers=3, heads=16, kv_heads=4, head_dim=32, ffn=384, vocab=1500)
        write_gguf(path, random_llama(replace(FOREIGN, tied=tied)), foreign.tokenizer, "foreign")
        base = GGUFFile(path)
        grow(base, large, tmp_path / "large.gguf", name="x", stream=final_stream(base), f32=True)
        found = random_logits(tmp_path / "large.gguf", FOREIGN.vocab)
        assert np.abs(found - random_logits(path, FOREIGN.vocab)).max() < BOUND


def test_texts_become_the_same_tokens(grown: Grown) -> None:
    base, large = LlamaModel(grown.base.path), LlamaModel(grown.scaled.model)
    files = islice(standard_library(held=True), 5)
    lines = [line for _, text in files for line in text.split("\n") if line.strip()]
    lines = [
        *lines[:200],
        "filler 4096",
        "filler▁4096",
        " filler 4096filler 4607",
        "é 日本語 🎉 <s></s>",
        "\n".join(lines[:99]),
    ]
    assert len(lines) == 205
    for line in lines:
        for special in (False, True):
            ids = base.tokenize(line, parse_special=special)
            assert large.tokenize(line, parse_special=special).tolist() == ids.tolist()
        assert large.detokenize(ids) == base.detokenize(ids)
    assert large.eog == base.eog and large.bos == base.bos
    base.close()
    large.close()


def ranked(
    path: Path, file: GGUFFile, states: Float32Array, dtype: Any = "f32"
) -> npt.NDArray[np.int32]:
    heads = load_heads(path, file)[0]
    drafter = drafter_for(heads, n_heads=heads.config.k_heads, ranks=10, dtype=dtype)
    behind = (
        np.random.default_rng(0)
        .integers(0, VOCAB, (len(states), heads.config.k_heads))
        .astype(np.int32)
    )
    return drafter.rank(states, behind)[0]


def test_grown_heads_guess_the_same(grown: Grown) -> None:
    assert grown.scaled.heads is not None
    file, tokens = GGUFFile(grown.scaled.model), text_tokens(grown.base.path)
    states, wide = outputs(grown.base.path, tokens)[1], outputs(grown.scaled.model, tokens)[1]
    ours, theirs = ranked(HEADS, grown.base, states), ranked(grown.scaled.heads, file, wide)
    assert (
        len(np.unique(ours)) > 100 and np.mean(ours == theirs) > 0.999
    )  # near-ties may change places
    assert ranked(grown.scaled.heads, file, wide, "int8").max() < VOCAB
    (heads, facts), known = load_heads(grown.scaled.heads, file), load_heads(HEADS, grown.base)[1]
    assert heads.weight.shape[2:] == (SMALL.dim, SMALL.dim)
    assert (
        facts["rank_accuracies"] == known["rank_accuracies"] and facts["base_name"] == "base-small"
    )
    assert np.array_equal(facts["token_counts"][:VOCAB], known["token_counts"])
    assert not facts["token_counts"][VOCAB:].any()


@pytest.mark.parametrize("head_type", ["medusa", "hydra"])
@pytest.mark.parametrize("hidden_dim", [0, 64])
def test_deep_heads_grow_and_own_lm_heads_are_refused(
    grown: Grown, hidden_dim: int, head_type: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file, states = GGUFFile(grown.scaled.model), torch.randn(20, 320)
    wide = torch.cat([states, torch.zeros(20, SMALL.dim - 321), torch.ones(20, 1)], 1)
    tokens = torch.randint(VOCAB, (20, 2))
    for lm_head in ("tied", "own"):
        config = HeadsConfig(
            k_heads=2,
            dim=320,
            vocab=VOCAB,
            head_layers=2,
            hidden_dim=hidden_dim,
            lm_head=lm_head,
            head_type=head_type,
        )
        heads = new_heads(config, grown.base).requires_grad_(False)
        for parameter in heads.parameters():
            parameter.normal_(std=0.05)
        save_heads(tmp_path / lm_head, heads, base_facts(grown.base))
        if lm_head == "own":
            with pytest.raises(HeadsError, match="own cannot be grown"):
                grow_heads(tmp_path / "own", grown.base, file, tmp_path / "large")
        else:
            grow_heads(tmp_path / "tied", grown.base, file, tmp_path / "large")
            large = load_heads(tmp_path / "large", file)[0]
            expected, found = heads.logits(states, tokens), large.logits(wide, tokens)
            assert torch.allclose(found[..., :VOCAB], expected, atol=1e-3)
            assert found[..., VOCAB:].max() < -200


def test_quantized_it_drafts_and_is_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scaled_model.SHAPES, "small", replace(SMALL, layers=6, vocab=4224))
    scaled = build("small", "Q4_0", "Q4_0", out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        scaled.model.name,
        scaled.model.stem + ".heads",
    }
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(scaled.model).tensors}
    assert kinds["output.weight"] == kinds["blk.5.ffn_down.weight"] == "Q4_0"
    # Loads it in a child first.
    options = LoadOptions(n_threads=1, context_size=512)
    loaded = LoadedModel(scaled.model, options, heads_path=scaled.heads)
    loaded.heads  # noqa: B018  (checks the LM head)
    with loaded.fixed_decoder(Tree.chain(3)) as decoder, loaded.fixed_decoder() as plain:
        request = loaded.request(PROMPTS[0][-500:], 48, SamplingParams())
        drafted = decoder.run(request)
        text = drafted.take_output().text
        assert plain.run(request).take_output().text == text != ""
        assert max(drafted.new_tokens) < VOCAB
        assert drafted.statistics.steps < 0.95 * drafted.n_new
    loaded.close()
    written = scaled.model.stat().st_mtime_ns
    assert (
        build("small", "Q4_0", "Q4_0", out=tmp_path) == scaled
        and scaled.model.stat().st_mtime_ns == written
    )
    monkeypatch.setattr(growth, "VERSION", -1)
    build("small", "Q4_0", "Q4_0", out=tmp_path)
    assert scaled.model.stat().st_mtime_ns > written


def write_other(path: Path, architecture: str, key: str = "") -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_token_list(["a"])
    writer.add_head_count(1)
    if key:
        writer.add_float32(key, 1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("this is a text of more than 24 bytes")
    cases = {
        tmp_path / "missing.gguf": "no such file",
        tmp_path / "text.gguf": "not a GGUF file",
        write_other(tmp_path / "gpt2.gguf", "gpt2"): "'gpt2'",
        write_other(
            tmp_path / "scaled.gguf", "llama", "llama.rope.scaling.factor"
        ): "llama.rope.scaling.factor",
        write_other(tmp_path / "empty.gguf", "llama"): "epsilon",
    }
    for path, said in cases.items():
        done = CliRunner().invoke(
            scale_up.main, ["--base", str(path), "--out", str(tmp_path / "out")]
        )
        assert done.exit_code == 2 and said in done.stderr and path.name in done.stderr, done.output
        assert (
            done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout
        )
    assert not (tmp_path / "out").exists()


def test_what_has_no_room_or_strange_tensors_is_refused(
    grown: Grown, foreign: Foreign, tmp_path: Path
) -> None:
    for change in (
        {"dim": 320},
        {"layers": 5},
        {"kv_heads": 4},
        {"ffn": 512},
        {"vocab": 4000},
        {"head_dim": 32},
    ):
        with pytest.raises(UsageError, match="no room"):
            grow(grown.base, replace(SMALL, **change), tmp_path / "x.gguf", name="x", stream=1.0)
    base = GGUFFile(foreign.f32)
    base.metadata["llama.feed_forward_length"] = 321
    with pytest.raises(ModelFileError, match=r"blk\.0\.ffn_down"):
        shape_of(base)
