"""Teaches heads from batches of states: AdamW, warm-up and cosine, validation, checkpoints, resuming.

Knows nothing of GGUF files, text and where states come from.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import DataError
from model.heads.files import save_heads, whole_folder, write_heads
from model.heads.losses import linear_cross_entropy, linear_distillation
from model.heads.medusa import MedusaHeads
from model.training.batches import Batch, Batches
from model.training.checkpoints import Progress, load_run, save_run
from model.training.evaluation import RANKS, Evaluation, evaluate, head_weights
from model.training.options import FREE_TO_CHANGE, TrainOptions
from model.training.record import Record
from model.training.stopping import stop_on_interrupt
from model.training.tuned_tree import simulated_length, tuned_nodes
from model.trees.costs import CostCurve

WARMUP = 0.05  # of all steps
SAVE_EVERY_S = 600.0  # `latest`, within long epochs
LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class TrainResult:
    """What came of a run; best: the folder of the heads whose tree has the longest acceptance length."""

    output_dir: Path
    best: Path
    latest: Path
    interrupted: bool
    steps: int
    evaluations: list[Evaluation]
    seconds: float


@dataclass(frozen=True)
class Lesson:
    """What the base model says of a batch: its LM head (V, D), and the states that decide each target (see Batch).

    Temperature and weight against the cross-entropy are `linear_distillation`'s.
    """

    lm_head: Tensor
    around: Tensor
    places: Tensor
    temperature: float
    kd_weight: float


def heads_loss(
    heads: MedusaHeads, states: Tensor, tokens: Tensor, targets: Tensor, lesson: Lesson | None = None
) -> Tensor:
    """Return the sum over heads of 0.8^k · mean loss; see Batch for what comes in.

    The loss is the cross-entropy with the targets, or distillation where there is a lesson.
    """
    config = heads.config
    hidden = heads.hidden(states, tokens)  # (K,N,D)
    wanted = targets.T.contiguous()  # (K,N)
    valid = wanted >= 0
    weights = head_weights(config.k_heads).to(states.device)[:, None] * valid / valid.sum(1, keepdim=True).clamp(min=1)
    wanted = wanted.clamp(min=0)
    scale: dict[str, Any] = {"logit_scale": heads.logit_scale, "soft_cap": heads.soft_cap}
    if lesson:
        taught_by = lesson.places + 1 + torch.arange(config.k_heads, device=states.device)[:, None]  # (K,N)
        return linear_distillation(
            hidden, heads.lm_head, lesson.around, lesson.lm_head, taught_by, wanted, weights,
            temperature=lesson.temperature, kd_weight=lesson.kd_weight, **scale,
        )  # fmt: skip
    if config.lm_head == "tied":  # one product for all heads
        flat = hidden.reshape(-1, config.dim)
        return linear_cross_entropy(flat, heads.lm_head, wanted.reshape(-1), weights.reshape(-1), **scale)
    # Unbound, not indexed: the gradient of an index is as large as all heads' matrices together, for each head.
    each = zip(hidden.unbind(0), heads.lm_head.unbind(0), wanted, weights, strict=True)
    return torch.stack([linear_cross_entropy(h, w, t, s, **scale) for h, w, t, s in each]).sum()


def learning_rate(step: int, total: int, peak: float) -> float:
    """Return the rate of step (from 0) of total: linear warm-up, then a half cosine down to zero."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def use_bf16(device: torch.device) -> bool:
    """Say whether the device has fast bf16: GPUs that support it, CPUs with AMX (others: 165 against 290 GFLOP/s)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported())


class Trainer:
    """One run: heads, optimiser, progress, and the folder that it writes to.

    facts: what `save_heads` keeps with the heads; identity: what must be equal to go on with a run later;
    teacher: the base model's LM head (V, D) for `--loss kd`; curve: what steps cost, by which the tree's size is tuned.
    """

    def __init__(
        self, heads: MedusaHeads, train: Batches, validation: Batches, options: TrainOptions, output_dir: Path,
        *, facts: dict[str, Any], identity: dict[str, str], teacher: Tensor | None = None,
        curve: CostCurve | None = None,
    ) -> None:  # fmt: skip
        self.teacher, self.curve = teacher, curve
        self.heads, self.options, self.output_dir = heads, options, output_dir
        self.facts, self.identity = facts, identity
        self.train, self.validation = train, validation
        self.device = heads.weight.device
        self.parameters = {name: p for name, p in heads.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.autocast = use_bf16(self.device)
        self.progress = Progress()
        self.steps_per_epoch = -(-len(train) // options.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * options.epochs
        self.best, self.latest = output_dir / "medusa_heads_best", output_dir / "medusa_heads_latest"

    def fit(self) -> TrainResult:
        """Train until all epochs are done or Ctrl-C asks to stop; `latest` is saved in either case."""
        start = time.monotonic()
        record = Record(self.output_dir, self.progress.step, self.options.report_to)
        evaluations: list[Evaluation] = []
        with contextlib.closing(record), stop_on_interrupt() as stop:
            while not self.finished and not stop.is_set():
                self._epoch(record, stop)
                if self.progress.step_in_epoch < self.steps_per_epoch:
                    break
                evaluations.append(self._finish_epoch(record))
            if self.progress.step_in_epoch or not self.progress.epoch:
                self.save_latest()
                record.draw()
        return TrainResult(
            self.output_dir, self.best, self.latest, not self.finished, self.progress.step, evaluations,
            time.monotonic() - start,
        )  # fmt: skip

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or as many without a gain as `--patience` allows."""
        at, patience = self.progress, self.options.patience
        return at.epoch >= self.options.epochs or 0 < patience <= at.epoch - at.best_epoch

    def _epoch(self, record: Record, stop: threading.Event) -> None:
        """Do the rest of the epoch's steps, or as many as there are before someone asks to stop."""
        at, accumulation = self.progress, self.options.gradient_accumulation_steps
        batches = self.train.epoch((self.options.seed, at.epoch), at.step_in_epoch * accumulation)
        saved = time.monotonic()
        title = f"epoch {at.epoch + 1}/{self.options.epochs}"
        with tqdm(
            total=self.steps_per_epoch, initial=at.step_in_epoch, desc=title, unit=" steps", mininterval=0.5
        ) as bar:
            while not stop.is_set() and (group := list(islice(batches, accumulation))):
                began = time.monotonic()
                rate, loss = self._step(group)
                at.step, at.step_in_epoch = at.step + 1, at.step_in_epoch + 1
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                if at.step % LOG_EVERY == 0 or at.step_in_epoch in (1, self.steps_per_epoch):
                    speed = sum(len(batch) for batch in group) / (time.monotonic() - began)
                    figures = {"epoch": at.epoch + 1, "loss": loss, "learning_rate": rate, "positions_per_s": speed}
                    record.add("train", at.step, figures)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self.save_latest()
                    saved = time.monotonic()
        if not at.step_in_epoch and not stop.is_set():
            raise DataError("no states to train on: those of all samples hold NaN or Inf")

    def _step(self, group: list[Batch]) -> tuple[float, float]:
        """Take one step of the optimiser; return its learning rate and loss."""
        rate = learning_rate(self.progress.step, self.total_steps, self.options.learning_rate)
        for setting in self.optimizer.param_groups:
            setting["lr"] = rate
        total = 0.0
        for batch in group:
            around, places = batch.around.to(self.device).float(), batch.places.to(self.device)
            tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
            lesson = self._lesson(around, places)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = heads_loss(self.heads, around[places], tokens, targets, lesson) / len(group)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise DataError(f"the loss is {total} at step {self.progress.step + 1}; try a lower --learning_rate")
        if self.options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rate, total

    def _lesson(self, around: Tensor, places: Tensor) -> Lesson | None:
        if self.options.loss == "ce":
            return None
        assert self.teacher is not None
        return Lesson(self.teacher, around, places, self.options.kd_temperature, self.options.kd_weight)

    def _finish_epoch(self, record: Record) -> Evaluation:
        """Validate, tell, and save what the epoch brought."""
        at = self.progress
        found = self._validate()
        at.epoch, at.step_in_epoch, at.rank_accuracies = at.epoch + 1, 0, found.rank_accuracies
        record.add("validation", at.step, {"epoch": at.epoch, **found.figures()})
        shares = " ".join(f"{share:.1%}" for share in found.top1)
        click.echo(
            f"epoch {at.epoch}: validation loss {found.loss:.3f}, top-1 by head {shares}, "
            f"acceptance length {found.acceptance_length:.2f}, {found.tree_length:.2f} with {found.tree_nodes} nodes"
        )
        better = found.tree_length > at.best
        if better:
            at.best, at.best_epoch = found.tree_length, at.epoch
        facts = self._facts(found)
        save_heads(self.output_dir / f"medusa_heads_epoch_{at.epoch}", self.heads, facts)
        if better:
            save_heads(self.best, self.heads, facts)
        self.save_latest(found)
        record.draw()
        if self.finished and at.epoch < self.options.epochs:
            click.echo(f"epoch {at.best_epoch} was the last that brought something; training ends (--patience)")
        return found

    def _validate(self) -> Evaluation:
        """Measure the heads; the first time, choose how many nodes their tree has, so that lengths can be compared."""
        at, found = self.progress, evaluate(self.heads, self.validation.epoch())
        at.tree_nodes = at.tree_nodes or tuned_nodes(found.rank_accuracies, self.curve)
        length = simulated_length(found.rank_accuracies, found.ranks.numpy(), at.tree_nodes)
        return replace(found, tree_nodes=at.tree_nodes, tree_length=length)

    def _facts(self, found: Evaluation | None) -> dict[str, Any]:
        at = self.progress
        training = {
            **self.facts["training"],
            "steps": at.step,
            "epochs_done": at.epoch,
            "options": {k: v for k, v in asdict(self.options).items() if k not in FREE_TO_CHANGE},  # no paths
        }
        if found:
            training["validation"] = found.figures()
        ranks = at.rank_accuracies or [[0.0] * RANKS] * self.heads.config.k_heads
        return {**self.facts, "training": training, "rank_accuracies": ranks}

    def save_latest(self, found: Evaluation | None = None) -> None:
        """Write `latest`, heads and the state of the run together, whole."""
        with whole_folder(self.latest) as folder:
            write_heads(folder, self.heads, self._facts(found))
            save_run(folder, self.parameters, self.optimizer, self.progress, self.options, self.identity)

    def resume(self, path: Path) -> None:
        """Take up a run that was stopped. Raises UsageError where it is not this run."""
        self.progress = load_run(path, self.parameters, self.optimizer, self.options, self.identity)
