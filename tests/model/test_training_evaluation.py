"""Figures of a validation, against a count by hand; and batches of positions for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.heads.hydra import HydraHeads
from model.heads.medusa import HeadsConfig, MedusaHeads
from model.training.data.samples import Sample
from model.training.evaluation import RANKS, evaluate
from model.training.states.batches import Batch, Batches, head_targets


class Known:
    """States that carry their sample and position, so that a test sees where each row came from."""

    def __init__(self, samples: list[Sample], missing: Sequence[int] = ()) -> None:
        self.samples = samples
        self.missing = set(missing)
        self.reads: list[int] = []

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        for i in order[since:]:
            self.reads.append(i)
            at = torch.arange(len(self.samples[i].tokens))
            yield (
                None if i in self.missing else torch.stack([torch.full_like(at, i), at], 1).float()
            )


def random_samples(n: int = 30, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, n)
    return [
        Sample(str(i), i, rng.integers(0, 50, t).astype(np.int32), rng.random(t) < 0.7)
        for i, t in enumerate(lengths)
    ]


def test_targets_of_a_sample() -> None:
    sample = Sample("a", 0, np.arange(10, 16, dtype=np.int32), np.array([0, 0, 1, 1, 0, 1], bool))
    assert head_targets(sample, 3).tolist() == [
        [12, 13, -1], [13, -1, 15], [-1, 15, -1], [15, -1, -1], [-1, -1, -1], [-1, -1, -1]
    ]  # fmt: skip


def test_batches_hold_each_position_once_with_its_targets() -> None:
    samples = random_samples()
    batches = Batches(Known(samples), range(5, 30), 3, 17)
    found = list(batches.epoch([0, 0]))
    sizes = [len(b.states) for b in found]
    assert len(sizes) == len(batches) == -(-batches.n_positions // 17)
    assert max(sizes) <= 17
    assert min(sizes) >= 17 - len(sizes)
    assert sum(len(b.states) for b in found) == batches.n_positions
    seen = set()
    for batch in found:
        rows = zip(
            batch.states.long().tolist(), batch.tokens.tolist(), batch.targets.tolist(), strict=True
        )
        for n, ((i, t), tokens, wanted) in enumerate(rows):
            seen.add((i, t))
            behind = samples[i].tokens[t + 1 : t + 4].tolist()
            assert tokens == behind + [0] * (3 - len(behind)), "whether they are learnt or not"
            for k, token in enumerate(wanted):
                place = t + 2 + k
                valid = place < len(samples[i].tokens) and samples[i].mask[place]
                assert token == (samples[i].tokens[place] if valid else -1)
                if valid:  # the state that decides it
                    assert batch.around[batch.places[n] + 1 + k].tolist() == [i, place - 1]
            assert max(wanted) >= 0
    assert len(seen) == batches.n_positions
    assert {i for i, _ in seen} <= set(range(5, 30))


@pytest.mark.parametrize("since", [1, 4, 9])
def test_an_epoch_can_be_entered_anywhere(since: int) -> None:
    states = Known(random_samples(), missing=[7, 8, 20])
    batches = Batches(states, range(30), 3, 17)
    whole = list(batches.epoch([0, 1]))
    states.reads.clear()
    late = list(batches.epoch([0, 1], since))
    assert len(states.reads) < 30, "samples that are over were read again"
    assert len(late) == len(whole) - since == len(batches) - since
    for a, b in zip(whole[since:], late, strict=True):
        assert torch.equal(a.states, b.states)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.around, b.around) and torch.equal(a.places, b.places)
    assert not torch.equal(next(batches.epoch([0, 2])).states, whole[0].states), (
        "each epoch has an order of its own"
    )


def test_samples_without_states_teach_nothing() -> None:
    samples = random_samples()
    batches = Batches(Known(samples, missing=[0, 3, 29]), range(30), 2, 8)
    for batch in batches.epoch():
        known = batch.targets.max(1).values >= 0
        assert not set(batch.states[known, 0].long().tolist()) & {3, 29}
        assert bool((batch.states[~known] == 0).all())


@pytest.mark.parametrize("head_type", ["medusa", "hydra"])
def test_figures_against_a_count_by_hand(head_type: Literal["medusa", "hydra"]) -> None:
    torch.manual_seed(0)
    config = HeadsConfig(k_heads=3, dim=8, vocab=20)
    heads = MedusaHeads(config, torch.randn(20, 8), soft_cap=5.0)
    if head_type == "hydra":
        heads = HydraHeads(config, torch.randn(20, 8), torch.randn(20, 8), soft_cap=5.0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.5)
    states = torch.randn(300, 8)
    targets = torch.randint(-1, 20, (300, 3))
    tokens = torch.randint(0, 20, (300, 3))
    # enough hits for the later heads; what Hydra heads read are the tokens before
    for k in range(3):
        with torch.no_grad():
            guesses = heads.logits(states, tokens)[k].argmax(-1)
        targets[:, k] = torch.where(torch.rand(300) < 0.5, guesses, targets[:, k])
        tokens[:, k + 1 :] = targets[:, k : k + 1].clamp(min=0)
    batch = Batch(states, torch.arange(300), tokens, targets)
    found = evaluate(heads, [batch[:131], batch[131:]])
    with torch.no_grad():
        logits = heads.logits(states, tokens)
    hits = np.zeros((3, RANKS))
    reached = np.zeros(3)
    for n in range(300):
        for k in range(3):
            wanted = int(targets[n, k])
            if wanted < 0:
                break
            rank = logits[k, n].argsort(descending=True).tolist().index(wanted)
            reached[k] += 1
            if rank < RANKS:
                hits[k, rank] += 1
            if rank:
                break
    for k in range(3):
        valid = targets[:, k] >= 0
        assert found.losses[k] == pytest.approx(
            float(F.cross_entropy(logits[k][valid], targets[valid, k])), rel=1e-5
        )
        best = logits[k][valid].topk(5).indices == targets[valid, k][:, None]
        assert found.top1[k] == pytest.approx(float(best[:, 0].float().mean()))
        assert found.top5[k] == pytest.approx(float(best.any(1).float().mean()))
        assert found.rank_accuracies[k] == pytest.approx((hits[k] / reached[k]).tolist(), abs=1e-5)
    first = [ranks[0] for ranks in found.rank_accuracies]
    chain = 1 + first[0] + first[0] * first[1] + first[0] * first[1] * first[2]
    assert found.acceptance_length == pytest.approx(chain, abs=1e-4)
    assert found.loss == pytest.approx(sum(0.8**k * loss for k, loss in enumerate(found.losses)))
    assert 1.3 < chain < 4
