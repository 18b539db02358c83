"""A run of `--hours`: the model writes answers, then heads learn them, in a time that is given.

    write a little ─▶ try a step ─▶ write as much as can be learnt ─▶ extract and train ─▶ heads
      a tenth         what it costs        (measured, not guessed)        the rest of the time

Each stage has both the cores and the memory to itself. The folder of the run keeps the answers and
the time that was spent: the same command goes on after a stop, one with more hours after the end.
Knows neither prompts nor heads.
"""

from __future__ import annotations

import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from model.errors import UsageError
from model.training.answer_writer import (
    FIRST_PROMPTS,
    Amount,
    AnswerWriter,
    amount_of,
    is_answered,
)
from model.training.options import TrainOptions
from model.training.output_folder import require_no_run
from model.training.time_plan import Costs, tokens_to_write
from model.training.timed_record import TimedRecord
from model.training.trainer import TrainResult

FOLDER = "timed_run"
PASSES = 6  # over the answers, that the time is divided for where nobody says how many
FIRST_SHARE = 0.1  # of the time: answers that are written before anything is measured
TRIAL_SHARE = 0.02  # of the time: the trial of training, or one step where that takes longer
TRIAL_TOKENS = 4096  # what is learnt in it
LEAST_ROUND = 0.02  # of the time: more answers are not worth the start of their process
LEAST_ANSWERS = 4  # to learn from and to validate on
# train(options, until, start): train up to a time of time.monotonic(), over a run in the same
# folder, from what the heads in `start` have learnt, where there are any.
Train = Callable[[TrainOptions, float, Path | None], TrainResult]


class TimedRun:
    """One run of `--hours`.

    folder: its output folder; FOLDER in it holds what a run needs to go on. command: `distill.py`
    and its interpreter, for the child process that writes answers.
    """

    def __init__(
        self, options: TrainOptions, folder: Path, *, train: Train, command: list[str]
    ) -> None:
        self._options = options
        self._output_dir = folder
        self._folder = folder / FOLDER
        self._train = train
        self._total_s = 3600 * options.hours
        self._record_path = self._folder / "record.json"
        if not self._record_path.exists():
            require_no_run(folder, "")
        self._record = TimedRecord.load(self._record_path)
        given = Path(options.dataset_name).expanduser()
        self._answers = self._folder / "answers.jsonl"
        self._writer: AnswerWriter | None = None
        if options.dataset_name and is_answered(given):
            self._answers = given
        else:
            self._writer = AnswerWriter(options, self._answers, command)
        self._began = time.monotonic() - self._record.spent_s

    def run(self) -> TrainResult:
        """Write, try, write, train.

        Raises UsageError where the time is too short for one step or spent already, and
        KeyboardInterrupt where someone stops it before training.
        """
        if self._left_s <= 0:
            raise UsageError(
                f"--hours {self._options.hours:g}: {self._record.spent_s / 3600:.2g} are spent in "
                f"{self._output_dir} already; a run of more hours goes on from there"
            )
        try:
            self._save()
            goes_on = self._record.training == self._training() and self._size() > 0
            if not goes_on:
                self._gather()
            result = self._learn(goes_on=goes_on)
            if not result.interrupted:
                self._record.training = ""
                shutil.rmtree(self._states().parent, ignore_errors=True)
            return result
        finally:
            self._save()

    @property
    def _left_s(self) -> float:
        return self._total_s - (time.monotonic() - self._began)

    def _save(self) -> None:
        self._record.spent_s = time.monotonic() - self._began
        self._record.save(self._record_path)

    def _training(self) -> str:
        """Say what is learnt in which time: a training that was stopped goes on while it is so."""
        return f"{self._size()} bytes of answers, {self._options.hours:g} hours"

    def _states(self) -> Path:
        """Return where the states of these answers are kept while they are learnt."""
        kept = Path(self._options.cache_dir) if self._options.cache_dir else self._folder
        run = zlib.crc32(str(self._output_dir.resolve()).encode())  # others may keep theirs there
        return kept / f"states-{run:08x}" / str(self._size())

    def _size(self) -> int:
        return self._answers.stat().st_size if self._answers.exists() else 0

    # ---- answers

    def _gather(self) -> None:
        """Write answers until the time that is left is just what learning them takes."""
        if self._writer:
            self._write_first(self._writer)
        amount = self._enough()
        costs = self._try_training(amount)
        self._require_one_step(amount, costs)
        if self._writer:
            self._write_rest(self._writer, costs)

    def _write_first(self, writer: AnswerWriter) -> None:
        """Write answers for a tenth of the time, or up to a half until there are a few."""
        there = amount_of(self._answers).answers
        first_s = FIRST_SHARE * self._total_s - self._record.written_s
        if first_s > 0 or there < LEAST_ANSWERS:
            half_s = self._left_s - self._total_s / 2
            self._write_once(writer, there + FIRST_PROMPTS, max(first_s, 0.0), most_s=half_s)

    def _write_rest(self, writer: AnswerWriter, costs: Costs) -> None:
        """Write as many answers as can be learnt, as far as there are prompts.

        That is planned anew after each round: the first answers take longer than those after them.
        """
        passes = self._options.epochs or PASSES
        more = True
        while more:
            there = amount_of(self._answers)
            costs = replace(costs, write_s=self._record.written_s / there.tokens)
            wanted = tokens_to_write(self._left_s, there.tokens, costs, passes)
            click.echo(f"plan    {costs}: {wanted:,} to be written, and learnt {passes} times")
            seconds = (wanted - there.tokens) * costs.write_s
            if seconds < self._total_s * LEAST_ROUND:
                return
            # As many prompts as the time will do for, going by those before.
            expected = round(there.answers * seconds / self._record.written_s)
            more = self._write_once(writer, there.answers + expected + FIRST_PROMPTS, seconds)

    def _write_once(
        self, writer: AnswerWriter, n_prompts: int, seconds: float, *, most_s: float = 0.0
    ) -> bool:
        """Write answers and note the time; False where every prompt had its answer before."""
        began = time.monotonic()
        try:
            return writer.write(n_prompts, seconds, least=LEAST_ANSWERS, most_s=most_s)
        finally:
            self._record.written_s += time.monotonic() - began
            self._save()

    def _enough(self) -> Amount:
        """Return how much there is to learn. Raises UsageError where it is nearly nothing."""
        amount = amount_of(self._answers)
        if amount.answers >= LEAST_ANSWERS:
            return amount
        raise UsageError(
            f"--hours {self._options.hours:g}: too short for one step, as there are "
            f"{amount.answers} answers after {self._total_s - self._left_s:.0f} s; they are kept, "
            "give more hours"
        )

    # ---- training

    def _try_training(self, amount: Amount) -> Costs:
        """Train for a moment, in a folder that goes again; return what a token costs."""
        click.echo("trial   a few steps, to know what they cost")
        folder = self._folder / ".trial"  # a name in which nobody looks for heads
        options = replace(
            self._options, dataset_name=str(self._answers), output_dir=str(folder),
            cache_dir=str(folder / "states"), max_tokens=TRIAL_TOKENS, report_to="none",
            batch_size=self._options.batch_size or 1, hours=0.0,
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)  # a killed run's
        began = time.monotonic()
        try:
            result = self._train(options, began + TRIAL_SHARE * self._total_s, None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if result.interrupted:
            raise KeyboardInterrupt
        tokens = min(TRIAL_TOKENS, amount.tokens)
        passes = result.steps / result.steps_per_epoch
        return Costs(
            write_s=self._record.written_s / amount.tokens,
            prepare_s=result.states_s / tokens,
            learn_s=result.steps_s / (passes * tokens),
            start_s=time.monotonic() - began - result.states_s - result.seconds,
        )

    def _require_one_step(self, amount: Amount, costs: Costs) -> None:
        """Raise UsageError where what is there cannot be made ready and learnt for one step."""
        step = min(TRIAL_TOKENS, amount.tokens)
        needed_s = costs.start_s + amount.tokens * costs.prepare_s + step * costs.learn_s
        if self._left_s < needed_s:
            hours = (self._total_s - self._left_s + needed_s) / 3600
            raise UsageError(
                f"--hours {self._options.hours:g}: too short for one step, which would be done "
                f"after {hours:.2g}; the answers are kept, give more hours"
            )

    def _learn(self, *, goes_on: bool) -> TrainResult:
        """Train on all answers for the rest of the time, or go on where that was stopped.

        Heads that learnt from fewer answers, in fewer hours, are gone on from.
        """
        options = replace(
            self._options, dataset_name=str(self._answers), output_dir=str(self._output_dir),
            cache_dir=str(self._states()), hours=0.0,
        )  # fmt: skip
        latest = self._output_dir / "medusa_heads_latest"
        if goes_on and latest.exists():
            options = replace(options, resume_from=str(self._output_dir))
        else:
            shutil.rmtree(latest, ignore_errors=True)
            mine = self._states()
            for states in mine.parent.glob("*"):
                if states != mine:  # those of fewer answers
                    shutil.rmtree(states, ignore_errors=True)
        self._record.training = self._training()
        self._save()
        best = self._output_dir / "medusa_heads_best"
        return self._train(options, time.monotonic() + self._left_s, best)
