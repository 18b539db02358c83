"""The trainer: steps and epochs, validation, checkpoints, resuming.

Knows nothing of GGUF files, text and where states come from.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
from torch import Tensor
from tqdm import tqdm

from model.errors import DataError
from model.heads.medusa import MedusaHeads
from model.storage.folder_lock import WriterLock
from model.training.checkpoints import RunProgress
from model.training.evaluation import Evaluation, evaluate
from model.training.learner import Learner, learning_rate
from model.training.options import TrainOptions
from model.training.ranks import ALONE, Ranks
from model.training.run_folder import RunFolder
from model.training.run_record import RunRecord
from model.training.states.batches import Batch, Batches
from model.training.stopping import stop_on_request
from model.training.tuned_tree import simulated_length, tuned_nodes
from model.trees.costs import CostCurve

SAVE_EVERY_S = 600.0  # `latest`, within long epochs
LOG_EVERY = 10  # steps


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came of a run.

    best: the folder of the heads whose tree has the longest acceptance length. seconds: of training
    and validating, steps_s of them of the steps alone; states_s: of making the states before.
    """

    output_dir: Path
    best: Path
    latest: Path
    interrupted: bool
    steps: int
    evaluations: list[Evaluation]
    seconds: float
    steps_per_epoch: int = 0
    steps_s: float = 0.0
    states_s: float = 0.0


class Trainer:
    """One run: heads, optimiser, progress, and the folder that it writes to.

    facts: what `save_heads` keeps with the heads; identity: what must be equal to go on with a run
    later; teacher: the base model's LM head (V, D) for `--loss kd`; curve: what steps cost, by
    which the tree's size is tuned; ranks: the processes that share each batch, of which the first
    one writes; until: train up to this time (time.monotonic's) instead of `--epochs`; taught: the
    heads have learnt before, and are `best` until others are better.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        train: Batches,
        validation: Batches,
        options: TrainOptions,
        output_dir: Path,
        *,
        facts: dict[str, Any],
        identity: dict[str, str],
        teacher: Tensor | None = None,
        curve: CostCurve | None = None,
        ranks: Ranks = ALONE,
        until: float | None = None,
        taught: bool = False,
    ) -> None:
        self.heads = heads
        self.options = options
        self.learner = Learner(heads, options, teacher, ranks)
        self.folder = RunFolder(output_dir, heads, self.learner, options, facts, identity)
        self.progress = RunProgress()
        self.steps_per_epoch = -(-len(train) // options.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * options.epochs
        self._train = train
        self._validation = validation
        self._curve = curve
        self._ranks = ranks
        self._until = until
        self._taught = taught
        self._validation_s = 0.0  # seconds of a validation, as last seen
        self._steps_s = 0.0
        self._counted_to = 0.0  # the time up to which progress.seconds counts

    def fit(self) -> TrainResult:
        """Train until all epochs are done or someone asks to stop; save `latest` in either case.

        Raises DataError where another process of the run is gone; `latest` is saved then, too.
        OutputError: no room.
        """
        start = time.monotonic()
        self._counted_to = start
        record = None
        if self._ranks.first:
            self.folder.require_room(self.options.epochs - self.progress.epoch)
            record = RunRecord(self.folder.path, self.progress.step, self.options.report_to)
        try:
            closing = contextlib.closing(record) if record else contextlib.nullcontext()
            with stop_on_request() as stop, closing:
                evaluations = self._epochs(record, stop)
        except RuntimeError as error:
            if self._ranks.count == 1:
                raise
            raise self._left_alone(error) from error
        return TrainResult(
            output_dir=self.folder.path,
            best=self.folder.best,
            latest=self.folder.latest,
            interrupted=not self.finished,
            steps=self.progress.step,
            evaluations=evaluations,
            seconds=time.monotonic() - start,
            steps_per_epoch=self.steps_per_epoch,
            steps_s=self._steps_s,
        )

    def resume(self, path: Path) -> None:
        """Go on with a run that was stopped. Raises UsageError where it is not this run."""
        self.progress = self.folder.load(path)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or as many without a gain as `--patience` allows.

        With `until`: whether that time has come, and the heads as they are then were validated.
        """
        epochs_without_gain = self.progress.epoch - self.progress.best_epoch
        if 0 < self.options.patience <= epochs_without_gain:
            return True
        if self._until is not None:
            return self._time_is_up() and not self.progress.step_in_epoch
        return self.progress.epoch >= self.options.epochs

    def _time_is_up(self) -> bool:
        """Whether a run with an end has just the time to validate what it has, after one step."""
        if self._until is None or not self.progress.step:
            return False
        return time.monotonic() + self._validation_s >= self._until

    def _left_alone(self, error: RuntimeError) -> DataError:
        """Save what there is, unless another process does, and return what to say."""
        # torchrun's; SIGKILL follows 30 seconds later.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(DataError), contextlib.ExitStack() as locked:
            if not self._ranks.first:  # the first one holds the lock, or is gone
                locked.enter_context(WriterLock(self.folder.path))
            self.folder.save_latest(self.progress)
        reason = str(error).strip().splitlines()[0]
        return DataError(
            f"a process of this run failed ({reason}); saved in {self.folder.latest} after "
            f"{self.progress.step} steps; go on with --resume_from {self.folder.path}"
        )

    # ---- steps and epochs

    def _epochs(self, record: RunRecord | None, stop: threading.Event) -> list[Evaluation]:
        evaluations: list[Evaluation] = []
        if self._taught and not self.progress.step:
            self.progress.best = self._validate().tree_length
            self._counted_to = time.monotonic()
        while not self.finished and not self._ranks.any(stop.is_set()):
            self._epoch(record, stop)
            ended = self.progress.step_in_epoch == self.steps_per_epoch
            if not ended and not self._time_is_up():
                break
            evaluations.append(self._finish_epoch(record))
        if self.progress.step_in_epoch or not self.progress.epoch:
            self.save_latest()
            if record:
                record.draw()
        return evaluations

    def _epoch(self, record: RunRecord | None, stop: threading.Event) -> None:
        """Do the rest of the epoch's steps, or as many as there are before someone asks to stop."""
        at = self.progress
        accumulation = self.options.gradient_accumulation_steps
        batches = self._train.epoch(
            (self.options.seed, at.epoch), since=at.step_in_epoch * accumulation
        )
        of_epochs = f"/{self.options.epochs}" if self._until is None else ""
        bar = tqdm(
            total=self.steps_per_epoch, initial=at.step_in_epoch, unit=" steps", mininterval=0.5,
            desc=f"epoch {at.epoch + 1}{of_epochs}",
        )  # fmt: skip
        saved = time.monotonic()
        with bar:
            while True:
                began = time.monotonic()
                asked = self._ranks.any(stop.is_set() or self._time_is_up())
                group = [] if asked else list(islice(batches, accumulation))
                if not group:
                    break
                rate, loss = self._step(group)
                self._steps_s += time.monotonic() - began
                if self._until is not None:  # validations count: they take their share of the time
                    now = time.monotonic()
                    at.seconds += now - self._counted_to
                    self._counted_to = now
                at.step += 1
                at.step_in_epoch += 1
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                if record and self._is_logged():
                    n_positions = sum(len(batch) for batch in group)
                    speed = n_positions / (time.monotonic() - began)
                    record.add("train", at.step, {
                        "epoch": at.epoch + 1, "loss": loss, "learning_rate": rate,
                        "positions_per_s": speed,
                    })  # fmt: skip
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self.save_latest()
                    saved = time.monotonic()
        if not at.step_in_epoch and not asked:
            raise DataError("no states to train on: those of all samples hold NaN or Inf")

    def _is_logged(self) -> bool:
        """Say whether the step just done is recorded: every tenth, an epoch's first and last."""
        at = self.progress
        return at.step % LOG_EVERY == 0 or at.step_in_epoch in (1, self.steps_per_epoch)

    def _step(self, group: list[Batch]) -> tuple[float, float]:
        """Do one step of the optimiser; return its learning rate and loss."""
        rate = learning_rate(self.progress.step, self._all_steps(), self.options.learning_rate)
        loss = self.learner.step(group, rate)
        if not math.isfinite(loss):
            raise DataError(
                f"the loss is {loss} at step {self.progress.step + 1}; try a lower --learning_rate"
            )
        return rate, loss

    def _all_steps(self) -> int:
        """Return how many steps the run will have; with `until`, going by those so far."""
        at = self.progress
        if self._until is None or not at.seconds:
            return self.total_steps
        left_s = max(0.0, self._until - self._validation_s - time.monotonic())
        return at.step + max(1, round(left_s * at.step / at.seconds))

    def _finish_epoch(self, record: RunRecord | None) -> Evaluation:
        """Validate, report, and save what the epoch brought."""
        at = self.progress
        found = self._validate()
        at.epoch += 1
        at.step_in_epoch = 0
        at.rank_accuracies = found.rank_accuracies
        none_yet = self._ranks.first_says(
            not self.folder.best.exists()
        )  # resumed into another folder, say
        better = found.tree_length > at.best or none_yet
        if better:
            at.best = found.tree_length
            at.best_epoch = at.epoch
        if record:
            self._report(record, found)
            # Nobody knows how many epochs there will be until a time: only the best is kept.
            self.folder.save_epoch(at, found, is_best=better, keep=self._until is None)
        self.save_latest(found)
        return found

    def save_latest(self, found: Evaluation | None = None) -> None:
        """Write `latest`; the first process does. found: the validation of these very weights."""
        if self._ranks.first:
            self.folder.save_latest(self.progress, found)

    # ---- validation

    def _validate(self) -> Evaluation:
        """Measure the heads.

        The first time, choose how many nodes their tree has, so that lengths can be compared.
        """
        began = time.monotonic()
        found = evaluate(self.heads, self._validation.epoch())
        self._validation_s = time.monotonic() - began
        nodes = self.progress.tree_nodes or tuned_nodes(found.rank_accuracies, self._curve)
        nodes = self._ranks.first_says(nodes)
        self.progress.tree_nodes = nodes
        length = simulated_length(found.rank_accuracies, found.ranks.numpy(), nodes)
        return replace(found, tree_nodes=nodes, tree_length=self._ranks.first_says(length))

    def _report(self, record: RunRecord, found: Evaluation) -> None:
        at = self.progress
        record.add("validation", at.step, {"epoch": at.epoch, **found.figures()})
        shares = " ".join(f"{share:.1%}" for share in found.top1)
        click.echo(
            f"epoch {at.epoch}: validation loss {found.loss:.3f}, top-1 by head {shares}, "
            f"acceptance length {found.acceptance_length:.2f}, "
            f"{found.tree_length:.2f} with {found.tree_nodes} nodes"
        )
        record.draw()
        if self.finished and self._until is None and at.epoch < self.options.epochs:
            click.echo(
                f"epoch {at.best_epoch} was the last that brought something; "
                "training ends (--patience)"
            )
