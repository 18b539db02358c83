"""Draft vocabulary: heads that know some tokens only, from the choice to the drafter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from model.errors import HeadsError
from model.heads.draft_vocabulary import MIN_TAUGHT_VOCAB, draft_vocabulary
from model.heads.files import HEADS_FILE, Rows, base_facts, load_heads, new_heads, save_heads
from model.heads.hydra import HydraHeads
from model.heads.hydra_drafter import drafter_for
from model.heads.medusa import HeadsConfig, MedusaHeads
from model.training.evaluation import RANKS, evaluate
from model.training.states.batches import Batch
from model.training.teaching import Teacher, heads_loss

K, D, V = 3, 16, 40
IDS = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37], np.int32)
R = len(IDS)
Type = Literal["medusa", "hydra"]
Own = Literal["tied", "own"]


class FakeBase:
    """What heads need of a GGUF; remembers the most rows that were ever read at once."""

    n_embd = D
    n_vocab = V
    name = "fake"
    file_type = "Q4_0"
    logit_scale = 0.5
    soft_cap = 30.0
    tied = False
    most_rows = 0

    def heads_fingerprint(self) -> str:
        return "t"

    def file_fingerprint(self) -> str:
        return "f"

    def _matrix(self, seed: int, rows: Rows) -> npt.NDArray[np.float32]:
        matrix = np.random.default_rng(seed).standard_normal((V, D), np.float32)[rows]
        self.most_rows = max(self.most_rows, len(matrix))
        return matrix

    def output_weight(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        return self._matrix(0, rows)

    def token_embeddings(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        return self._matrix(1, rows)


def make(head_type: Type, lm_head: Own = "tied") -> tuple[MedusaHeads, MedusaHeads]:
    """Return heads of all tokens and heads of some, with the same weights."""
    torch.manual_seed(0)
    config = HeadsConfig(k_heads=K, dim=D, vocab=V, head_type=head_type, lm_head=lm_head)
    whole = new_heads(config, FakeBase())
    ids = torch.from_numpy(IDS)
    some = new_heads(replace(config, draft_vocab=R), FakeBase(), draft_ids=ids)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            rows = ids.long() if name == "lm_head" else torch.arange(parameter.shape[1])
            some.get_parameter(name).copy_(parameter[:, rows])
    return whole, some


def positions(n: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Return states (n, D), tokens and targets (n, K), some of which teach nothing."""
    torch.manual_seed(1)
    return torch.randn(n, D), torch.randint(0, V, (n, K)), torch.randint(-1, V, (n, K))


def test_the_number_follows_the_text_and_the_unseen_come_by_their_ids() -> None:
    counts = np.zeros(60_000, np.int64)
    counts[50_000:50_010] = 7
    ids = draft_vocabulary(counts, None)
    assert ids is not None
    others = np.arange(MIN_TAUGHT_VOCAB - 10)
    assert ids.tolist() == [*others, *range(50_000, 50_010)]
    counts[:20_000] += 1
    ids = draft_vocabulary(counts, None)
    assert ids is not None and len(ids) == 20_032  # 99.9 %, and then a multiple of 64
    ids = draft_vocabulary(counts, 10)
    assert ids is not None and ids.tolist() == list(range(50_000, 50_010))
    assert draft_vocabulary(counts, 0) is None
    assert draft_vocabulary(counts, 60_000) is None
    assert draft_vocabulary(counts[:5000], None) is None


@pytest.mark.parametrize("head_type", ["medusa", "hydra"])
@pytest.mark.parametrize("lm_head", ["tied", "own"])
def test_logits_are_those_of_all_tokens_at_its_own(head_type: Type, lm_head: Own) -> None:
    whole, some = make(head_type, lm_head)
    states, tokens, targets = positions()
    found = some.logits(states, tokens)
    wanted = whole.logits(states, tokens)[..., IDS]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)  # embeddings are in f16
    rows = some.rows_of(targets)
    assert torch.equal(rows >= 0, torch.isin(targets, torch.from_numpy(IDS)))
    assert torch.equal(some.draft_ids[rows[rows >= 0]].long(), targets[rows >= 0])
    assert torch.equal(whole.rows_of(targets), targets)


def restricted_loss(
    heads: MedusaHeads, around: Tensor, batch: Batch, lm_head: Tensor, rows: Tensor
) -> Tensor:
    """Return the distillation loss with logits materialised; lm_head (R, D) is the teacher's."""
    logits = heads.logits(around[batch.places], batch.tokens)
    base = 30 * torch.tanh(0.5 * around @ lm_head.T / 30)
    total = torch.zeros(())
    for k in range(K):
        valid = rows[:, k] >= 0
        taught = base[batch.places[valid] + 1 + k].log_softmax(1)
        student = logits[k, valid].log_softmax(1)
        total = total + 0.8**k * F.kl_div(student, taught, log_target=True, reduction="batchmean")
    return total


@pytest.mark.parametrize("head_type", ["medusa", "hydra"])
def test_the_teacher_is_restricted_and_targets_outside_teach_nothing(head_type: Type) -> None:
    _, some = make(head_type)
    around = torch.randn(60, D)
    _, tokens, targets = positions(50)
    batch = Batch(around, torch.arange(50), tokens, targets)
    rows = some.rows_of(targets)
    teacher = Teacher(
        lm_head=some.lm_head, around=around, places=batch.places, temperature=1.0, kd_weight=1.0
    )
    found = heads_loss(some, around[batch.places], tokens, rows, teacher)
    wanted = restricted_loss(some, around, batch, some.lm_head, rows)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (a,) = torch.autograd.grad(found, some.weight)
    (b,) = torch.autograd.grad(wanted, some.weight)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    # With targets outside taken along, it would be another loss.
    all_rows = torch.where(targets >= 0, 0, -1)
    other = restricted_loss(some, around, batch, some.lm_head, all_rows)
    assert float(other.detach()) != pytest.approx(float(wanted.detach()), rel=1e-3)


def test_acceptance_counts_tokens_outside_as_misses() -> None:
    whole, some = make("medusa")
    states, tokens, targets = positions(300)
    with torch.no_grad():  # half of the targets are best guesses, of all tokens
        best = whole.logits(states, tokens).argmax(-1).T
    targets = torch.where(torch.rand(300, K) < 0.5, best, targets)
    found = evaluate(some, [Batch(states, torch.arange(300), tokens, targets)])
    with torch.no_grad():
        guesses = some.draft_ids[some.logits(states, tokens).argmax(-1)].T  # (n, K)
    outside = (targets >= 0) & ~torch.isin(targets, torch.from_numpy(IDS))
    assert int(outside.sum()) > 100
    assert bool((found.ranks[outside] == RANKS).all())
    right = (guesses == targets).float().sum(0) / (targets >= 0).sum(0)
    assert found.top1 == pytest.approx(right.tolist())
    inside_alone = evaluate(
        some, [Batch(states, torch.arange(300), tokens, torch.where(outside, -1, targets))]
    )
    assert inside_alone.losses == pytest.approx(found.losses)
    assert inside_alone.top1[0] > found.top1[0]


@pytest.mark.parametrize("head_type", ["medusa", "hydra"])
@pytest.mark.parametrize("draft_vocab", [0, 4])
def test_drafts_are_tokens_of_the_vocabulary(head_type: Type, draft_vocab: int) -> None:
    _, some = make(head_type)
    counts = np.ones(V, np.int32)
    counts[[5, 19, 31, 37]] = 9
    counts[[1, 4]] = 99  # frequent, but never taught
    drafter = drafter_for(
        some, n_heads=K, ranks=2, draft_vocab=draft_vocab, token_counts=counts, dtype="f32"
    )
    states, tokens, _ = positions(5)
    found, _ = drafter.rank(states.numpy(), tokens.numpy())
    kept = IDS if not draft_vocab else np.array([5, 19, 31, 37])
    with torch.no_grad():
        logits = some.logits(states, tokens)[..., np.searchsorted(IDS, kept)]
    expected = kept[logits.transpose(0, 1).topk(2).indices.numpy()]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("head_type", ["medusa", "hydra"])
@pytest.mark.parametrize("lm_head", ["tied", "own"])
def test_it_is_kept_with_the_heads(tmp_path: Path, head_type: Type, lm_head: Own) -> None:
    _, some = make(head_type, lm_head)
    facts: dict[str, Any] = {**base_facts(FakeBase()), "rank_accuracies": []}
    save_heads(tmp_path / "heads", some, facts)
    loaded, config = load_heads(tmp_path / "heads", FakeBase())
    assert config["draft_vocab"] == R
    assert loaded.draft_ids.tolist() == IDS.tolist()
    states, tokens, _ = positions()
    assert torch.equal(loaded.logits(states, tokens), some.logits(states, tokens))


@pytest.mark.parametrize("head_type", ["medusa", "hydra"])
def test_the_whole_lm_head_is_never_in_memory(
    head_type: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.heads.files._BLOCK", 8)
    base = FakeBase()
    config = HeadsConfig(k_heads=K, dim=D, vocab=V, head_type=head_type, draft_vocab=R)
    heads = new_heads(config, base, draft_ids=torch.from_numpy(IDS))
    assert base.most_rows == R
    if isinstance(heads, HydraHeads):
        assert heads.embeddings.dtype == torch.float16
        expected = torch.from_numpy(FakeBase().token_embeddings()).half()
        assert torch.equal(heads.embeddings, expected)


@pytest.mark.parametrize("bad", [[3, 2], [2, 2], [-1, 3], [3, V]])
def test_ids_that_make_no_sense_are_refused(tmp_path: Path, bad: list[int]) -> None:
    _, some = make("medusa")
    save_heads(tmp_path / "heads", some, {**base_facts(FakeBase()), "rank_accuracies": []})
    file = tmp_path / "heads" / HEADS_FILE
    tensors = load_file(file)
    at = 0 if bad[0] < 2 or bad[1] <= bad[0] else R - 2
    tensors["draft_ids"][at : at + 2] = torch.tensor(bad, dtype=torch.int32)
    save_file(tensors, file)
    with pytest.raises(HeadsError, match="draft_ids"):
        load_heads(tmp_path / "heads", FakeBase())
