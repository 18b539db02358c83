"""Training: it learns, stops anywhere and resumes to the bit, and writes whole files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from model.errors import DataError, OutputError, UsageError
from model.heads.hydra import HydraHeads
from model.heads.medusa import HeadsConfig, MedusaHeads
from model.training import trainer as trainer_module
from model.training.checkpoints import read_run
from model.training.data.samples import Sample
from model.training.learner import learning_rate
from model.training.options import TrainOptions
from model.training.states.batches import Batches
from model.training.teaching import Teacher, heads_loss
from model.training.trainer import Trainer
from model.training.tuned_tree import NODES

DIM = 16
VOCAB = 30
OPTIONS = TrainOptions(
    head_type="medusa", loss="ce", k_heads=2, epochs=2, learning_rate=1e-2,
    gradient_accumulation_steps=2, weight_decay=0.01,
)  # fmt: skip


class Counting:
    """Texts that count up from a random start, and states that tell the token they stand at."""

    def __init__(self, n: int = 60) -> None:
        rng = np.random.default_rng(0)
        starts = rng.integers(0, VOCAB, n)
        self.samples = [
            Sample(str(i), i, ((start + np.arange(20)) % VOCAB).astype(np.int32), np.ones(20, bool))
            for i, start in enumerate(starts)
        ]
        self.table = torch.from_numpy(rng.standard_normal((VOCAB, DIM)).astype(np.float32))

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        for i in order[since:]:
            yield self.table[torch.from_numpy(self.samples[i].tokens).long()].half()


class Nothing(Counting):
    """States that could not be used."""

    def read(self, order: Sequence[int], since: int = 0) -> Iterator[Tensor | None]:
        for _ in order[since:]:
            yield None


def build(
    folder: Path,
    options: TrainOptions = OPTIONS,
    states: Counting | None = None,
    until: float | None = None,
    taught: bool = False,
    **config: Any,
) -> Trainer:
    torch.manual_seed(0)
    states = states or Counting()
    shape = HeadsConfig(k_heads=2, dim=DIM, vocab=VOCAB, **config, head_type=options.head_type)
    heads = MedusaHeads(shape, torch.randn(VOCAB, DIM))
    if options.head_type == "hydra":
        heads = HydraHeads(shape, heads.lm_head, torch.randn(VOCAB, DIM))
    train = Batches(states, range(50), 2, 64)
    check = Batches(states, range(50, 60), 2, 64)
    facts: dict[str, Any] = {
        "heads_fingerprint": "h", "base_fingerprint": "b", "base_name": "n",
        "base_file_type": "F32",
        "token_counts": np.ones(VOCAB, np.int64), "training": {},
    }  # fmt: skip
    return Trainer(
        heads,
        train,
        check,
        options,
        folder,
        facts=facts,
        identity={"text": "1"},
        teacher=torch.randn(VOCAB, DIM),
        until=until,
        taught=taught,
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "medusa_lm_head.safetensors")


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send Ctrl-C to this process during a step."""
    original = Trainer._step

    def stepping(self: Trainer, group: Any) -> tuple[float, float]:
        if self.progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, group)

    monkeypatch.setattr(Trainer, "_step", stepping)


@pytest.mark.parametrize("config", [{}, {"lm_head": "own"}, {"head_layers": 2, "hidden_dim": 8}])
def test_heads_learn_to_count(tmp_path: Path, config: dict[str, Any]) -> None:
    result = build(
        tmp_path,
        replace(OPTIONS, epochs=6, learning_rate=5e-2, gradient_accumulation_steps=1),
        **config,
    ).fit()
    assert not result.interrupted
    assert min(result.evaluations[-1].top1) > 0.9
    assert result.evaluations[-1].acceptance_length > 2.7
    assert result.evaluations[0].loss > 2 * result.evaluations[-1].loss


class Halves(Counting):
    """Texts of a token by chance and the one behind it, in turn; states encode their own token."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        for i, sample in enumerate(self.samples):
            pairs = rng.integers(0, VOCAB, 10).repeat(2) + [0, 1] * 10
            self.samples[i] = replace(sample, tokens=(pairs % VOCAB).astype(np.int32))


def test_only_hydra_learns_what_hangs_on_drafted_tokens(tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=6, learning_rate=5e-2, gradient_accumulation_steps=1)
    found = {}
    for head_type in ("medusa", "hydra"):
        run = build(tmp_path / head_type, replace(options, head_type=head_type), Halves())
        found[head_type] = run.fit().evaluations[-1].top1
    assert max(found["medusa"]) < 0.1, "states know nothing of what follows"
    assert min(found["hydra"]) > 0.15, "every other token is the one behind the token before"


@pytest.mark.parametrize("lm_head", ["tied", "own"])
def test_loss_is_the_weighted_sum_of_means(lm_head: Any) -> None:
    torch.manual_seed(0)
    config = HeadsConfig(k_heads=3, dim=DIM, vocab=VOCAB, lm_head=lm_head)
    heads = MedusaHeads(config, torch.randn(VOCAB, DIM), 0.5, 10.0)
    with torch.no_grad():
        heads.weight.normal_(std=0.3)
    states = torch.randn(40, DIM)
    targets = torch.randint(-1, VOCAB, (40, 3))
    targets[:, 2] = -1
    logits = heads.logits(states)
    wanted = sum(
        0.8**k * F.cross_entropy(logits[k], targets[:, k], ignore_index=-1) for k in range(2)
    )
    assert isinstance(wanted, Tensor)
    found = heads_loss(heads, states, targets, targets)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (a,) = torch.autograd.grad(found, heads.weight)
    (b,) = torch.autograd.grad(wanted, heads.weight)
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("lm_head", ["tied", "own"])
def test_the_base_model_teaches_head_k_by_the_state_k_places_on(lm_head: Any) -> None:
    torch.manual_seed(0)
    base = torch.randn(VOCAB, DIM)
    config = HeadsConfig(k_heads=3, dim=DIM, vocab=VOCAB, lm_head=lm_head)
    heads = MedusaHeads(config, base, 0.5, 10.0)
    with torch.no_grad():
        heads.weight.normal_(std=0.3)
        if lm_head == "own":
            heads.lm_head.normal_()  # the teacher's stays as it is
    (batch,) = Batches(Counting(4), range(4), 3, 1000).epoch()
    around = batch.around.float()
    teacher = Teacher(
        lm_head=base, around=around, places=batch.places, temperature=1.5, kd_weight=0.7
    )
    found = heads_loss(heads, around[batch.places], batch.tokens, batch.targets, teacher)
    logits = heads.logits(around[batch.places])
    capped = 10 * torch.tanh(0.5 * around @ base.T / 10)
    wanted = torch.zeros(())
    for k in range(3):
        valid = batch.targets[:, k] >= 0
        student = logits[k, valid]
        base_logits = capped[batch.places[valid] + 1 + k]
        kl = F.kl_div(
            (student / 1.5).log_softmax(1),
            (base_logits / 1.5).log_softmax(1),
            log_target=True,
            reduction="batchmean",
        )
        hard = F.cross_entropy(student, batch.targets[valid, k])
        wanted = wanted + 0.8**k * (0.7 * 1.5**2 * kl + 0.3 * hard)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (a,) = torch.autograd.grad(found, heads.weight)
    (b,) = torch.autograd.grad(wanted, heads.weight)
    assert torch.allclose(a, b, atol=1e-6)


def test_own_lm_heads_share_one_gradient() -> None:
    """Indexing (K,V,D) K times would make K gradients of that size."""
    config = HeadsConfig(k_heads=3, dim=DIM, vocab=VOCAB, lm_head="own")
    heads = MedusaHeads(config, torch.randn(VOCAB, DIM))
    waiting: list[Any] = [
        heads_loss(heads, torch.randn(9, DIM), *torch.randint(0, VOCAB, (2, 9, 3))).grad_fn
    ]
    readers = set()
    while waiting:
        node = waiting.pop()
        behind = [function for function, _ in node.next_functions if function is not None]
        if any(getattr(function, "variable", None) is heads.lm_head for function in behind):
            readers.add(node)
        waiting += behind
    assert [node.name() for node in readers] == ["UnbindBackward0"]


def test_everything_is_written(tmp_path: Path) -> None:
    result = build(tmp_path).fit()
    names = {path.name for path in tmp_path.iterdir()}
    folders = {
        "medusa_heads_best",
        "medusa_heads_latest",
        "medusa_heads_epoch_1",
        "medusa_heads_epoch_2",
    }
    assert names == folders | {"metrics.jsonl", "training.png", "runs"}
    config = json.loads((result.best / "config.json").read_text())
    assert np.array(config["rank_accuracies"]).shape == (2, 10)
    assert config["training"]["validation"]["tree_length"] == max(
        e.tree_length for e in result.evaluations
    )
    assert weights(result.best)["token_counts"].tolist() == [1] * VOCAB
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    checks = [line for line in lines if line["kind"] == "validation"]
    assert [(line["epoch"], line["tree_nodes"]) for line in checks] == [(1, NODES), (2, NODES)]
    assert lines[-1]["step"] == result.steps == build(tmp_path).total_steps
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("step", "loss"), [(1, "ce"), (5, "ce"), (8, "ce"), (11, "ce"), (1, "kd"), (11, "kd")]
)
def test_stopped_and_resumed_is_equal_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, loss: Any
) -> None:
    options = replace(OPTIONS, loss=loss, kd_weight=0.5)
    whole = build(tmp_path / "whole", options).fit()
    assert whole.steps == 16
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        stopped = build(tmp_path / "parts", options).fit()
    assert stopped.interrupted
    assert stopped.steps == step
    again = build(tmp_path / "parts", options)
    with torch.no_grad():
        again.heads.weight.normal_()  # nothing of a fresh start may survive
    again.resume(tmp_path / "parts")
    result = again.fit()
    assert not result.interrupted
    for folder in ("medusa_heads_best", "medusa_heads_latest", "medusa_heads_epoch_2"):
        a = weights(tmp_path / "whole" / folder)
        b = weights(tmp_path / "parts" / folder)
        assert all(torch.equal(a[name], b[name]) for name in a), folder
    a, b = (read_run(tmp_path / name) for name in ("whole", "parts"))
    assert a["progress"] == b["progress"]
    figures = []
    for name in ("whole", "parts"):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").open())
        figures.append([(row["kind"], row["step"], row["loss"]) for row in rows])
    assert sorted(set(figures[0]) - set(figures[1])) == []
    assert len(figures[1]) == len(set(figures[1]))


def test_a_run_that_goes_on_elsewhere_has_a_best_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(11, patch)
        build(tmp_path / "here").fit()
    there = build(tmp_path / "there")
    there.resume(tmp_path / "here")
    there.progress.best = 99.0  # nothing will be better than the first epoch was
    assert (there.fit().best / "medusa_lm_head.safetensors").exists()


def test_a_run_that_ended_has_nothing_left_to_do(tmp_path: Path) -> None:
    build(tmp_path).fit()
    before = (tmp_path / "medusa_heads_latest" / "trainer_state.safetensors").read_bytes()
    again = build(tmp_path)
    again.resume(tmp_path / "medusa_heads_latest")
    result = again.fit()
    assert (result.interrupted, result.evaluations) == (False, [])
    assert (tmp_path / "medusa_heads_latest" / "trainer_state.safetensors").read_bytes() == before


def test_lost_lines_of_the_record_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after `latest` was saved: figures of steps done again must not be there twice."""
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        build(tmp_path).fit()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"kind": "train", "step": 6, "loss": 1.0}\n{"kind": "tra')
    again = build(tmp_path)
    again.resume(tmp_path)
    again.fit()
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    assert 6 not in steps


def test_another_run_cannot_be_resumed(tmp_path: Path) -> None:
    build(tmp_path).fit()
    with pytest.raises(UsageError, match=r"another learning_rate \(0.01, now 1.0\)"):
        build(tmp_path, replace(OPTIONS, learning_rate=1.0)).resume(tmp_path)
    with pytest.raises(UsageError, match=r"another head_type \(medusa, now hydra\)"):
        build(tmp_path, replace(OPTIONS, head_type="hydra")).resume(tmp_path)
    with pytest.raises(UsageError, match=r"another k_heads \(2, now 3\)"):
        build(tmp_path, replace(OPTIONS, k_heads=3)).resume(tmp_path)
    other = build(tmp_path)
    other.folder.identity = {"text": "2"}
    with pytest.raises(UsageError, match="another text"):
        other.resume(tmp_path)
    with pytest.raises(UsageError, match="no run to go on with"):
        other.resume(tmp_path / "nowhere")


def test_a_run_whose_heads_will_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    heads = 4 * sum(p.numel() for p in run.learner.parameters.values())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=heads * (run.options.epochs + 8))
    )
    with pytest.raises(OutputError, match=r"medusa_heads_latest: .* are needed"):
        run.fit()
    assert not list(tmp_path.iterdir())


def test_no_usable_states(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NaN or Inf"):
        build(tmp_path, states=Nothing()).fit()


def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(tmp_path)
    with torch.no_grad():
        run.heads.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match="lower --learning_rate"):
        run.fit()
    assert not (tmp_path / "medusa_heads_latest").exists()


def stage(lengths: Iterable[float], patch: pytest.MonkeyPatch) -> None:
    """Let the tuned tree have these lengths, epoch by epoch."""
    given = iter(lengths)
    patch.setattr(trainer_module, "simulated_length", lambda *args: next(given))


def test_best_is_the_epoch_whose_tree_accepts_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage([2.0, 3.0, 2.5], monkeypatch)
    result = build(tmp_path, replace(OPTIONS, epochs=3)).fit()
    assert len(result.evaluations) == 3
    best = weights(tmp_path / "medusa_heads_best")
    second = weights(tmp_path / "medusa_heads_epoch_2")
    assert all(torch.equal(best[name], second[name]) for name in best)


@pytest.mark.parametrize("better", [False, True])
def test_heads_that_are_taught_more_stay_until_others_are_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    build(tmp_path, replace(OPTIONS, epochs=1)).fit()
    before = weights(tmp_path / "medusa_heads_best")
    # How good they are is measured first, on what the others are measured on.
    stage([3.0, 2.0, 3.5 if better else 2.5], monkeypatch)
    build(tmp_path, OPTIONS, taught=True).fit()
    after = weights(tmp_path / "medusa_heads_best")
    assert better != all(torch.equal(before[name], after[name]) for name in before)


def test_patience_ends_a_run_that_brings_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage([2.0, 3.0, 2.5, 3.0, 4.0], monkeypatch)
    options = replace(OPTIONS, epochs=5, patience=2)
    result = build(tmp_path, options).fit()
    assert (result.interrupted, len(result.evaluations)) == (False, 4)
    assert "epoch 2 was the last" in capsys.readouterr().out
    again = build(tmp_path, options)
    again.resume(tmp_path)
    assert again.fit().evaluations == []
    longer = build(tmp_path, replace(options, patience=3))  # free to change: the run goes on
    longer.resume(tmp_path)
    assert [e.tree_length for e in longer.fit().evaluations] == [4.0]
    best = weights(tmp_path / "medusa_heads_best")
    last = weights(tmp_path / "medusa_heads_epoch_5")
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, 200, 1.0) for step in range(200)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert learning_rate(0, 1, 1.0) == 1.0


class Clock:
    """A clock that only steps and validations move, so that no host's load is in a test."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, step_s: float, validation_s: float
    ) -> None:
        self.now = 1000.0
        monkeypatch.setattr(trainer_module, "time", self)
        self._moves(monkeypatch, Trainer, "_step", step_s)
        self._moves(monkeypatch, trainer_module, "evaluate", validation_s)

    def monotonic(self) -> float:
        return self.now

    def _moves(
        self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, seconds: float
    ) -> None:
        original = getattr(owner, name)

        def timed(*given: Any) -> Any:
            self.now += seconds
            return original(*given)

        monkeypatch.setattr(owner, name, timed)


def test_a_run_until_a_time_ends_there_with_heads_that_were_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many epochs that is; the learning rate comes to its end at the same time."""
    clock = Clock(monkeypatch, step_s=0.1, validation_s=0.3)
    until = clock.now + 10
    result = build(tmp_path, replace(OPTIONS, epochs=1), until=until).fit()
    assert abs(clock.now - until) < 0.4  # a step and a validation
    assert not result.interrupted and len(result.evaluations) > 1
    assert (result.best / "config.json").exists() and not list(tmp_path.glob("*epoch_*"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert lines[-1]["kind"] == "validation" and lines[-1]["step"] == result.steps
    assert rates[-1] < 0.1 * max(rates) and max(rates) > 0.9 * OPTIONS.learning_rate


def test_a_time_that_is_over_leaves_one_step(tmp_path: Path) -> None:
    result = build(tmp_path, until=time.monotonic() - 1).fit()
    assert result.steps == 1 and not result.interrupted and result.best.exists()


def test_a_run_until_a_time_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        assert build(tmp_path, until=time.monotonic() + 60).fit().interrupted
    clock = Clock(monkeypatch, step_s=0.1, validation_s=0.3)
    trainer = build(tmp_path, until=clock.now + 3)
    trainer.resume(tmp_path)
    assert trainer.progress.step == 3 and trainer.progress.seconds > 0
    result = trainer.fit()
    assert not result.interrupted and result.steps > 3
