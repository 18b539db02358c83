"""The fast drafter against the heads' own logits, in all types and shapes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.decoding.drafters.drafter import HEADS, RankingDrafter
from model.errors import HeadsError
from model.heads.draft_vocabulary import covering
from model.heads.drafter import HeadsDrafter, MedusaDrafter
from model.heads.fast import DType
from model.heads.medusa import HeadsConfig, MedusaHeads
from model.storage import facts

K, D, V = 4, 64, 500


def make(
    lm_head: str = "tied", layers: int = 1, hidden: int = 0, scale: float = 1.0, cap: float = 0.0
) -> MedusaHeads:
    torch.manual_seed(0)
    config = HeadsConfig(
        k_heads=K,
        dim=D,
        vocab=V,
        head_layers=layers,
        hidden_dim=hidden,
        lm_head=lm_head,  # type: ignore[arg-type]
    )
    heads = MedusaHeads(config, torch.randn(V, D) * 2 * D**-0.5, scale, cap)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5 * D**-0.5)
    return heads


def states(rows: int, dim: int = D) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((rows, dim), np.float32)


@pytest.mark.parametrize("lm_head", ["tied", "own"])
@pytest.mark.parametrize(("layers", "hidden"), [(1, 0), (1, 16), (3, 0), (2, 16)])
@pytest.mark.parametrize(("n_heads", "ranks"), [(4, 1), (2, 3)])
def test_f32_drafts_are_the_heads_best_tokens(
    lm_head: str, layers: int, hidden: int, n_heads: int, ranks: int
) -> None:
    heads = make(lm_head, layers, hidden, 0.5, 3.0)
    drafter = MedusaDrafter(heads, n_heads=n_heads, ranks=ranks, dtype="f32", with_probs=True)
    for rows in (1, 5):
        with torch.no_grad():
            of_heads = heads.logits(torch.from_numpy(states(rows)))[:n_heads]
        logits = of_heads.transpose(0, 1)  # (B,K,V)
        expected = logits.softmax(-1).topk(ranks)
        tokens, probs = drafter.rank(states(rows))
        assert tokens.dtype == np.int32
        assert tokens.tolist() == expected.indices.tolist()
        assert probs is not None
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs, expected.values.numpy(), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["auto", "f32", "bf16", "int8"])
def test_shapes_and_no_probabilities_unless_asked(dtype: DType) -> None:
    drafter = MedusaDrafter(make(), n_heads=3, ranks=2, dtype=dtype)
    assert drafter.dtype in ("f32", "bf16", "int8")
    for rows in (1, 2, 7, 1):
        tokens, probs = drafter.rank(states(rows))
        assert tokens.shape == (rows, 3, 2)
        assert probs is None
        assert ((tokens >= 0) & (tokens < V)).all()
        assert (tokens[..., 0] != tokens[..., 1]).all()


@pytest.mark.parametrize("lm_head", ["tied", "own"])
@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_draft_vocabulary(lm_head: str, dtype: DType) -> None:
    heads = make(lm_head)
    counts = np.zeros(V, np.int32)
    kept = np.array([3, 77, 210, 499])
    counts[kept] = [5, 9, 7, 5]
    drafter = MedusaDrafter(
        heads, n_heads=K, ranks=4, draft_vocab=4, token_counts=counts, dtype=dtype
    )
    with torch.no_grad():
        order = (
            heads.logits(torch.from_numpy(states(3)))[..., kept]
            .argsort(-1, descending=True)
            .transpose(0, 1)
        )
    tokens, _ = drafter.rank(states(3))
    assert set(tokens.flatten()) == set(kept)
    if dtype == "f32":
        np.testing.assert_array_equal(tokens, kept[order.numpy()])


def test_covering_tokens() -> None:
    counts = np.zeros(40_000, np.int32)
    counts[::4] = 1  # 10,000 tokens, each as frequent as the other
    assert [covering(counts, share) for share in (0.5, 0.995, 1.0)] == [5056, 9984, 10048]
    counts[7] = 2**31 - 1  # one makes up nearly everything
    assert covering(counts, 0.995) == 1024


def test_drafter_keeps_its_results_and_its_input() -> None:
    drafter = MedusaDrafter(make(), n_heads=2, ranks=2, dtype="f32")
    hidden = states(3)
    before = hidden.copy()
    first, _ = drafter.rank(hidden[:1])
    kept = first.copy()
    drafter.rank(hidden[1:])
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(hidden, before)


def agreement(dtype: DType, n: int = 500, spoil: bool = False) -> float:
    """Return the share of top-1 drafts equal to f32's.

    States lean towards one token's row, to a best probability of 0.05 in the median: harder than
    ordinary text. On rows of mere noise the two best logits would be nearer than 8 bits can tell.
    """
    generator = torch.Generator().manual_seed(0)
    dim = 128
    vocab = 2000
    lm_head = torch.randn(vocab, dim, generator=generator) * dim**-0.5
    heads = MedusaHeads(HeadsConfig(k_heads=2, dim=dim, vocab=vocab), lm_head)
    with torch.no_grad():
        heads.weight.normal_(0, 0.5 * dim**-0.5, generator=generator)
    chosen = lm_head[torch.randint(vocab, (n,), generator=generator)]
    lean = 6 * torch.rand(n, 1, generator=generator) + 2
    rows = (lean * chosen + torch.randn(n, dim, generator=generator)).numpy()
    exact = MedusaDrafter(heads, n_heads=2, ranks=1, dtype="f32").rank(rows)[0]
    if spoil:
        heads.weight.data.mul_(-1)
    other = MedusaDrafter(heads, n_heads=2, ranks=1, dtype=dtype)
    drafted = np.concatenate([other.rank(rows[i : i + 1])[0] for i in range(n)])
    return float((exact == drafted).mean())


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_low_precision_drafts_nearly_always_the_same(dtype: DType) -> None:
    assert agreement(dtype) >= 0.95


def test_the_comparison_sees_wrong_weights() -> None:
    assert agreement("int8", spoil=True) < 0.9


def test_a_row_of_zeros_is_no_trouble_in_int8() -> None:
    heads = make()
    heads.lm_head[7] = 0
    tokens, probs = MedusaDrafter(heads, n_heads=K, ranks=3, dtype="int8", with_probs=True).rank(
        states(2)
    )
    assert probs is not None
    assert np.isfinite(probs).all()
    assert ((tokens >= 0) & (tokens < V)).all()


def test_the_draft_source_has_decodings_name() -> None:
    drafter: RankingDrafter = MedusaDrafter(make(), n_heads=1, ranks=1, dtype="f32")
    assert HeadsDrafter.name == drafter.name == HEADS


def test_without_torchs_deprecated_parts_drafting_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A torch of some day: no TorchScript, no quantized tensors."""
    heads = make(layers=2, hidden=16)
    expected, _ = MedusaDrafter(heads, n_heads=K, ranks=2, dtype="f32").rank(states(3))
    monkeypatch.setattr(facts, "folder", lambda: tmp_path)
    monkeypatch.delattr(torch.jit, "trace")
    monkeypatch.delattr(torch, "quantize_per_channel")
    plain = MedusaDrafter(heads, n_heads=K, ranks=2, dtype="f32")
    assert not isinstance(plain._logits, torch.jit.ScriptModule)
    assert plain.rank(states(3))[0].tolist() == expected.tolist()
    chosen = MedusaDrafter(heads, n_heads=K, ranks=2, dtype="auto")
    assert chosen.dtype in ("bf16", "f32")
    with pytest.raises(RuntimeError, match="no quantized tensors"):
        MedusaDrafter(heads, n_heads=K, ranks=2, dtype="int8")


def test_what_cannot_be_drafted_is_refused() -> None:
    heads = make()
    with pytest.raises(HeadsError, match="5 heads: the file holds 4"):
        MedusaDrafter(heads, n_heads=5, ranks=1)
    with pytest.raises(HeadsError, match="rank 501"):
        MedusaDrafter(heads, n_heads=1, ranks=501)
    with pytest.raises(HeadsError, match="token_counts"):
        MedusaDrafter(heads, n_heads=1, ranks=1, draft_vocab=10)
