"""Answers written for a while: `distill.py` in a child process that is stopped when time is up.

Its own output goes into a log file beside the answers. Knows nothing of training.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from model.errors import DataError
from model.training.options import TrainOptions
from model.training.stopping import stop_on_request

FIRST_PROMPTS = 64  # to begin with, and at least so many more each time
# Of an answer: attention over long ones takes most of a step that many share (NOTES.md).
MAX_NEW_TOKENS = 256
LOOK_EVERY_S = 0.5
PATIENCE_S = 60.0  # for a child that was asked to stop
BAR = "answers  {percentage:3.0f}% |{bar:30}| of {total:.0f} s{postfix}"


class Amount(NamedTuple):
    """How many answers a file holds, and how many tokens, prompts included."""

    answers: int
    tokens: int


def amount_of(path: Path) -> Amount:
    """Return how much a file of answers holds; a torn last line doesn't count."""
    answers = 0
    tokens = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError):
                tokens += len(json.loads(line)["tokens"])
                answers += 1
    return Amount(answers, tokens)


def is_answered(path: Path) -> bool:
    """Say whether a data set is a file of answers with ids, which nobody needs to write again."""
    try:
        with path.open("rb") as file:
            return "answer_spans" in json.loads(file.readline())
    except (OSError, ValueError, TypeError):
        return False


class AnswerWriter:
    """Adds answers to a file. command: `distill.py` and its interpreter."""

    def __init__(self, options: TrainOptions, answers: Path, command: list[str]) -> None:
        self._answers = answers
        self._log = answers.with_suffix(".log")
        self._command = [
            *command,
            "--base_model_path", options.base_model_path,
            "--output", str(answers),
            "--seed", str(options.seed),
            "--max_length", str(options.max_length),
            "--max_new_tokens", str(MAX_NEW_TOKENS),
            "--prompts", options.dataset_name,
            "--dataset_split", options.dataset_split,
            "--stop_with_stdin",
        ]  # fmt: skip

    def write(self, n_prompts: int, seconds: float, *, least: int = 0, most_s: float = 0) -> bool:
        """Answer the first n_prompts prompts, or as many of them as get an answer in that time.

        Where there are fewer than `least` answers by then, go on, up to most_s. False where not one
        more was answered though time was left: there are no other prompts. Raises DataError where
        the child fails, KeyboardInterrupt where someone asks to stop.
        """
        before = _count_lines(self._answers)
        until = time.monotonic() + seconds
        with self._log.open("w", encoding="utf-8") as log, stop_on_request() as stop:
            # A session of its own: a Ctrl-C reaches it through us alone. It ends with its standard
            # input, and so with us, however we end.
            child = subprocess.Popen(
                [*self._command, "--max_prompts", str(n_prompts)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                self._watch(child, seconds, least, most_s, stop.is_set)
            finally:
                ended_itself = child.poll() is not None
                _stop(child)
        if stop.is_set():
            raise KeyboardInterrupt
        if ended_itself and child.returncode:
            raise DataError(f"no answers could be written: {self._last_words()}")
        return time.monotonic() >= until or _count_lines(self._answers) > before

    def _watch(
        self,
        child: subprocess.Popen[bytes],
        seconds: float,
        least: int,
        most_s: float,
        stopped: Callable[[], bool],
    ) -> None:
        """Show how many answers there are, until the child ends, time is up or someone stops us."""
        began = time.monotonic()
        with tqdm(total=seconds, bar_format=BAR) as bar:
            while child.poll() is None and not stopped():
                spent = time.monotonic() - began
                n_answers = _count_lines(self._answers)
                if spent >= seconds and (n_answers >= least or spent >= most_s):
                    return
                bar.set_postfix_str(f"{n_answers:,} answers", refresh=False)
                bar.update(min(spent, seconds) - bar.n)
                time.sleep(min(LOOK_EVERY_S, max(seconds - spent, 0.05)))

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"see {self._log}"


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child as Ctrl-C does, so that it keeps what is finished."""
    assert child.stdin
    child.stdin.close()
    try:
        child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
