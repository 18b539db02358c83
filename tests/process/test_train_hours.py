"""`--hours`: from nothing but a GGUF to heads, in the time that is given; stopped and gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model.base.gguf_file import GGUFFile
from model.errors import UsageError
from model.heads.files import load_heads
from model.train_medusa import main
from model.training import answer_writer, timed_run
from model.training.answer_writer import amount_of
from model.training.options import TrainOptions
from model.training.time_plan import Costs
from model.training.trainer import TrainResult

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--k_heads", "1", "--max_length", "192", "--batch_size", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_THREADS", "1")


def arguments(gguf: Path, folder: Path, seconds: float, *more: str) -> list[str]:
    places = ["--output_dir", str(folder / "out"), "--cache_dir", str(folder / "states")]
    named = ["--base_model_path", str(gguf), "--hours", str(seconds / 3600)]
    return [*named, *places, *SMALL, *more]


def run(*given: str) -> Result:
    return CliRunner().invoke(main, list(given))


def test_a_gguf_alone_gives_heads_in_the_time_that_is_given(
    foreign_gguf: Path, tmp_path: Path
) -> None:
    given = arguments(foreign_gguf, tmp_path, 24)
    began = time.monotonic()
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert 18 < time.monotonic() - began < 50
    assert "plan " in result.output and "done " in result.output
    out = tmp_path / "out"
    answers = out / "timed_run" / "answers.jsonl"
    config = json.loads((out / "medusa_heads_best" / "config.json").read_text())
    assert config["training"]["tokens"] == amount_of(answers).tokens
    assert load_heads(out / "medusa_heads_best", GGUFFile(foreign_gguf))
    assert not (out / "timed_run" / ".trial").exists()
    assert not list(out.glob("medusa_heads_epoch_*"))

    # The same time again is spent; another run is not overwritten.
    again = run(*given)
    assert isinstance(again.exception, UsageError) and "spent" in str(again.exception)
    other = run(*given, "--hours", "0")
    assert isinstance(other.exception, UsageError) and "earlier run" in str(other.exception)


def test_own_answers_are_not_answered_again(foreign_gguf: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    script = [sys.executable, str(ROOT / "model" / "distill.py")]
    more = ["--max_prompts", "30", "--max_new_tokens", "24", "--prompt_tokens", "8-20"]
    named = ["--base_model_path", str(foreign_gguf), "--output", str(answers)]
    subprocess.run([*script, *named, *more], check=True, capture_output=True)
    before = answers.read_bytes()
    result = run(*arguments(foreign_gguf, tmp_path, 20, "--dataset_name", str(answers)))
    assert result.exit_code == 0, result.output
    assert answers.read_bytes() == before
    timed_run_folder = tmp_path / "out" / "timed_run"
    assert not (timed_run_folder / "answers.jsonl").exists()
    assert not list((tmp_path / "states").glob("states-*"))
    assert not list(timed_run_folder.glob("states-*"))

    # More hours: no other answers, so the heads learn more from these.
    result = run(*arguments(foreign_gguf, tmp_path, 34, "--dataset_name", str(answers)))
    assert result.exit_code == 0 and "are taught more" in result.output, result.output


@pytest.mark.parametrize("stage", ["answers", "training"])
def test_a_stopped_run_goes_on(foreign_gguf: Path, tmp_path: Path, stage: str) -> None:
    given = arguments(foreign_gguf, tmp_path, 36)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "user-cache")}
    stopped = subprocess.Popen(
        [sys.executable, str(ROOT / "model" / "train_medusa.py"), *given],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    out = tmp_path / "out"
    answers = out / "timed_run" / "answers.jsonl"
    awaited = answers if stage == "answers" else out / "medusa_heads_best" / "config.json"
    while not awaited.exists() or not awaited.stat().st_size:
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    told = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == 130, told
    record = json.loads((out / "timed_run" / "record.json").read_text())
    assert 0 < record["spent_s"] < 36 and bool(record["training"]) == (stage == "training")
    before = answers.read_bytes()

    began = time.monotonic()
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert time.monotonic() - began < 36 - record["spent_s"] + 20
    assert answers.read_bytes().startswith(before)
    assert ("plan " in result.output) == (stage == "answers"), "training goes on as it stood"
    if stage == "training":
        assert answers.read_bytes() == before


def test_too_little_time_says_so(foreign_gguf: Path, tmp_path: Path) -> None:
    result = run(*arguments(foreign_gguf, tmp_path, 1))
    assert isinstance(result.exception, UsageError)
    assert "too short for one step" in str(result.exception)


def test_a_step_that_takes_longer_than_is_left_says_so(
    foreign_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that would take weeks, by what the trial is made to say."""
    costs = Costs(write_s=1.0, prepare_s=1.0, learn_s=10_000.0)
    monkeypatch.setattr(timed_run.TimedRun, "_try_training", lambda *_: costs)
    result = run(*arguments(foreign_gguf, tmp_path, 10))
    assert isinstance(result.exception, UsageError)
    assert "too short for one step, which would be done after" in str(result.exception)


def test_what_stops_the_answers_is_said(foreign_gguf: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.jsonl")
    result = run(*arguments(foreign_gguf, tmp_path, 20, "--dataset_name", absent))
    assert "absent.jsonl" in str(result.exception)


def test_all_prompts_answered_leaves_the_time_to_training(
    foreign_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_writer, "FIRST_PROMPTS", 4)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"x{i} = "}) for i in range(8)))
    result = run(*arguments(foreign_gguf, tmp_path, 24, "--dataset_name", str(prompts)))
    assert result.exit_code == 0, result.output
    assert amount_of(tmp_path / "out" / "timed_run" / "answers.jsonl").answers == 8


def test_the_plan_follows_the_answers_when_they_come_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answers take a hundred times as long as the others: then fewer seconds do."""
    n_tokens, learn_s, calls = 10, 0.0006, list[float]()

    class Clock:
        """Only what is waited for takes time, whatever else this machine does."""

        now = 1000.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(timed_run, "time", clock)

    class Writer:
        def __init__(self, options: TrainOptions, answers: Path, command: list[str]) -> None:
            self.answers = answers

        def write(self, n_prompts: int, seconds: float, *, least: int, most_s: float) -> bool:
            until = clock.monotonic() + seconds
            there = amount_of(self.answers).answers
            with self.answers.open("a") as file:
                for number in range(there, n_prompts):
                    if number >= least and clock.monotonic() >= until:
                        break
                    clock.sleep(0.1 if number < least else 0.001)
                    file.write(json.dumps({"tokens": [1] * n_tokens}) + "\n")
            return True

    def train(options: TrainOptions, until: float, start: Path | None) -> TrainResult:
        calls.append(until - clock.monotonic())
        learnt = 2 * min(timed_run.TRIAL_TOKENS, amount_of(answers).tokens)
        if len(calls) == 1:
            clock.sleep(learnt * learn_s)
        return TrainResult(
            output_dir=tmp_path, best=tmp_path, latest=tmp_path, interrupted=False, steps=2,
            evaluations=[], seconds=learnt * learn_s, steps_s=learnt * learn_s, steps_per_epoch=1,
        )  # fmt: skip

    monkeypatch.setattr(timed_run, "AnswerWriter", Writer)
    answers = tmp_path / timed_run.FOLDER / "answers.jsonl"
    answers.parent.mkdir()
    options = TrainOptions(hours=4 / 3600)
    timed_run.TimedRun(options, tmp_path, train=train, command=[]).run()
    needed_s = timed_run.PASSES * amount_of(answers).tokens * learn_s
    assert calls[-1] == pytest.approx(needed_s, rel=0.35)
