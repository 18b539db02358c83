"""Teaches heads from batches of states: AdamW, warm-up and cosine, validation, checkpoints, resuming.

Knows nothing of GGUF files, text and where states come from.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model.base.whole_file import require_room
from model.errors import DataError
from model.heads.files import save_heads, whole_folder, write_heads
from model.heads.medusa import MedusaHeads
from model.training.batches import Batch, Batches
from model.training.checkpoints import Progress, load_run, save_run
from model.training.evaluation import RANKS, Evaluation, evaluate
from model.training.options import FREE_TO_CHANGE, TrainOptions
from model.training.ranks import ALONE, Ranks
from model.training.record import Record
from model.training.stopping import stop_on_request
from model.training.storage import WriterLock
from model.training.teaching import Teaching
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
    teacher: the base model's LM head (V, D) for `--loss kd`; curve: what steps cost, by which the tree's size is tuned;
    ranks: the processes that share each batch, of which the first one writes.
    """

    def __init__(
        self, heads: MedusaHeads, train: Batches, validation: Batches, options: TrainOptions, output_dir: Path,
        *, facts: dict[str, Any], identity: dict[str, str], teacher: Tensor | None = None,
        curve: CostCurve | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.curve, self.ranks = curve, ranks
        self.heads, self.options, self.output_dir = heads, options, output_dir
        self.facts, self.identity = facts, identity
        self.train, self.validation = train, validation
        self.device = heads.weight.device
        self.parameters = {name: p for name, p in heads.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.teaching: nn.Module = Teaching(heads, options, teacher)
        if ranks.count > 1:
            self.teaching = DistributedDataParallel(self.teaching, broadcast_buffers=False)
        self.autocast = use_bf16(self.device)
        self.progress = Progress()
        self.steps_per_epoch = -(-len(train) // options.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * options.epochs
        self.best, self.latest = output_dir / "medusa_heads_best", output_dir / "medusa_heads_latest"

    def fit(self) -> TrainResult:
        """Train until all epochs are done or someone asks to stop; `latest` is saved in either case.

        Raises DataError where another process of the run is gone; `latest` is saved then, too. OutputError: no room.
        """
        start = time.monotonic()
        if self.ranks.first:
            self._require_room()
        record = Record(self.output_dir, self.progress.step, self.options.report_to) if self.ranks.first else None
        try:
            with stop_on_request() as stop, contextlib.closing(record) if record else contextlib.nullcontext():
                evaluations = self._epochs(record, stop)
        except RuntimeError as error:
            if self.ranks.count == 1:
                raise
            raise self._left_alone(error) from error
        return TrainResult(
            self.output_dir, self.best, self.latest, not self.finished, self.progress.step, evaluations,
            time.monotonic() - start,
        )  # fmt: skip

    def _require_room(self) -> None:
        """Raise OutputError where the disk has no room for what the run will write: better now than after an epoch."""
        heads = 4 * sum(p.numel() for p in self.parameters.values())  # bytes, in f32
        left, latest = self.options.epochs - self.progress.epoch, 4 * heads  # with weights and moments of the optimiser
        # `best` and `latest` twice: what is replaced stays until its successor is there.
        require_room(self.latest, heads * (left + 2) + 2 * latest)

    def _epochs(self, record: Record | None, stop: threading.Event) -> list[Evaluation]:
        evaluations = list[Evaluation]()
        while not self.finished and not self.ranks.any(stop.is_set()):
            self._epoch(record, stop)
            if self.progress.step_in_epoch < self.steps_per_epoch:
                break
            evaluations.append(self._finish_epoch(record))
        if self.progress.step_in_epoch or not self.progress.epoch:
            self.save_latest()
            if record:
                record.draw()
        return evaluations

    def _left_alone(self, error: RuntimeError) -> DataError:
        """Save what there is, unless another process does, and return what to say."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's; SIGKILL follows 30 seconds later
        with contextlib.suppress(DataError), contextlib.ExitStack() as locked:
            if not self.ranks.first:  # the first one holds the lock, or is gone
                locked.enter_context(WriterLock(self.output_dir))
            self._write_latest(None)
        reason = str(error).strip().splitlines()[0]
        return DataError(
            f"a process of this run failed ({reason}); saved in {self.latest} after {self.progress.step} steps; "
            f"go on with --resume_from {self.output_dir}"
        )

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or as many without a gain as `--patience` allows."""
        at, patience = self.progress, self.options.patience
        return at.epoch >= self.options.epochs or 0 < patience <= at.epoch - at.best_epoch

    def _epoch(self, record: Record | None, stop: threading.Event) -> None:
        """Do the rest of the epoch's steps, or as many as there are before someone asks to stop."""
        at, accumulation = self.progress, self.options.gradient_accumulation_steps
        batches = self.train.epoch((self.options.seed, at.epoch), at.step_in_epoch * accumulation)
        saved, asked = time.monotonic(), False
        title = f"epoch {at.epoch + 1}/{self.options.epochs}"
        with tqdm(
            total=self.steps_per_epoch, initial=at.step_in_epoch, desc=title, unit=" steps", mininterval=0.5
        ) as bar:
            while not (asked := self.ranks.any(stop.is_set())) and (group := list(islice(batches, accumulation))):
                began = time.monotonic()
                rate, loss = self._step(group)
                at.step, at.step_in_epoch = at.step + 1, at.step_in_epoch + 1
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                if record and (at.step % LOG_EVERY == 0 or at.step_in_epoch in (1, self.steps_per_epoch)):
                    speed = sum(len(batch) for batch in group) / (time.monotonic() - began)
                    figures = {"epoch": at.epoch + 1, "loss": loss, "learning_rate": rate, "positions_per_s": speed}
                    record.add("train", at.step, figures)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self.save_latest()
                    saved = time.monotonic()
        if not at.step_in_epoch and not asked:
            raise DataError("no states to train on: those of all samples hold NaN or Inf")

    def _step(self, group: list[Batch]) -> tuple[float, float]:
        """Take one step of the optimiser; return its learning rate and loss."""
        rate = learning_rate(self.progress.step, self.total_steps, self.options.learning_rate)
        for setting in self.optimizer.param_groups:
            setting["lr"] = rate
        total = 0.0
        for number, batch in enumerate(group, 1):
            shared = self.teaching if isinstance(self.teaching, DistributedDataParallel) else None
            with shared.no_sync() if shared and number < len(group) else contextlib.nullcontext():  # but for the last
                total += self._teach(batch, len(group))
        total = float(self.ranks.sum(torch.tensor(total, dtype=torch.float64)))
        if not math.isfinite(total):
            raise DataError(f"the loss is {total} at step {self.progress.step + 1}; try a lower --learning_rate")
        if self.options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rate, total

    def _teach(self, batch: Batch, parts: int) -> float:
        """Add the gradients of this process's rows of a batch, one of `parts` of a step; return their loss."""
        counts, n, of = (batch.targets >= 0).sum(0).to(self.device), len(batch), self.ranks.count
        rows = batch[n * self.ranks.rank // of : n * (self.ranks.rank + 1) // of]
        around, *rest = (t.to(self.device) for t in (rows.around, rows.places, rows.tokens, rows.targets))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.teaching(around.float(), *rest, counts) / parts
        (loss * of).backward()  # DistributedDataParallel takes the mean over processes
        return loss.item()

    def _finish_epoch(self, record: Record | None) -> Evaluation:
        """Validate, tell, and save what the epoch brought."""
        at = self.progress
        found = self._validate()
        at.epoch, at.step_in_epoch, at.rank_accuracies = at.epoch + 1, 0, found.rank_accuracies
        none_yet = self.ranks.first_says(not self.best.exists())  # resumed into another folder, say
        better = found.tree_length > at.best or none_yet
        if better:
            at.best, at.best_epoch = found.tree_length, at.epoch
        if record:
            self._tell(record, found)
            facts = self._facts(found)
            save_heads(self.output_dir / f"medusa_heads_epoch_{at.epoch}", self.heads, facts)
            if better:
                save_heads(self.best, self.heads, facts)
        self.save_latest(found)
        return found

    def _tell(self, record: Record, found: Evaluation) -> None:
        at = self.progress
        record.add("validation", at.step, {"epoch": at.epoch, **found.figures()})
        shares = " ".join(f"{share:.1%}" for share in found.top1)
        click.echo(
            f"epoch {at.epoch}: validation loss {found.loss:.3f}, top-1 by head {shares}, "
            f"acceptance length {found.acceptance_length:.2f}, {found.tree_length:.2f} with {found.tree_nodes} nodes"
        )
        record.draw()
        if self.finished and at.epoch < self.options.epochs:
            click.echo(f"epoch {at.best_epoch} was the last that brought something; training ends (--patience)")

    def _validate(self) -> Evaluation:
        """Measure the heads; the first time, choose how many nodes their tree has, so that lengths can be compared."""
        at, found = self.progress, evaluate(self.heads, self.validation.epoch())
        at.tree_nodes = self.ranks.first_says(at.tree_nodes or tuned_nodes(found.rank_accuracies, self.curve))
        length = simulated_length(found.rank_accuracies, found.ranks.numpy(), at.tree_nodes)
        return replace(found, tree_nodes=at.tree_nodes, tree_length=self.ranks.first_says(length))

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
        """Write `latest`, heads and the state of the run together, whole; the first process does."""
        if self.ranks.first:
            self._write_latest(found)

    def _write_latest(self, found: Evaluation | None) -> None:
        with whole_folder(self.latest) as folder:
            write_heads(folder, self.heads, self._facts(found))
            save_run(folder, self.parameters, self.optimizer, self.progress, self.options, self.identity)

    def resume(self, path: Path) -> None:
        """Take up a run that was stopped. Raises UsageError where it is not this run."""
        self.progress = load_run(path, self.parameters, self.optimizer, self.options, self.identity)
