"""Prompt files: what speed and acceptance are measured on, each prompt with the kind of its task.

Reads the project's own files, plain text, and MT-bench's, Spec-Bench's and ShareGPT's as they come.
Knows no model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import DataError

PROMPTS = Path(__file__).resolve().parents[1] / "prompts"
# Nothing of these four is in a training text. Of each pair, commands compare on the first, and
# auto-tuning measures on the second. Tasks for users of a chat model, in six kinds:
TASKS = PROMPTS / "tasks.jsonl"
TASK_TRIALS = PROMPTS / "task_trials.jsonl"
# Python source to go on with, for a model without a chat template:
PYTHON = PROMPTS / "python.jsonl"
PYTHON_TRIALS = PROMPTS / "python_trials.jsonl"
USERS = ("human", "user")  # what conversations call the one who asks


@dataclass(frozen=True)
class Task:
    """A prompt, and the kind of task that it is; "" where the file names none."""

    text: str
    kind: str = ""


def read_tasks(path: Path) -> list[Task]:
    """Read the prompts of a file, in its order.

    .txt has one per line. .jsonl has an object per line, .json a list of them: with "prompt", with
    "turns" (MT-bench, Spec-Bench; the first one is taken) or with "conversations" or "messages"
    (ShareGPT; what the user says first, and a conversation in which no user speaks is left out).
    "kind" or "category" names the kind. Raises DataError where there are no prompts, or one cannot
    be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as prompts ({error})") from None
    tasks = [task for task in _tasks_of(path, text) if task is not None]
    if not tasks:
        raise DataError(f"{path}: holds no prompts")
    return tasks


def read_prompt_file(path: Path) -> list[str]:
    """Read the texts of `read_tasks` alone."""
    return [task.text for task in read_tasks(path)]


def in_turn(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks in another order, one of each kind in turn, so that the first n are of all."""
    kinds = dict.fromkeys(task.kind for task in tasks)
    of_kind = [[task for task in tasks if task.kind == kind] for kind in kinds]
    rounds = itertools.zip_longest(*of_kind)
    return [task for one_of_each in rounds for task in one_of_each if task is not None]


def _tasks_of(path: Path, text: str) -> Iterator[Task | None]:
    if path.suffix == ".json":
        yield from _tasks_of_list(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield Task(line)
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield _task_of(row, f"{path}:{number}")


def _tasks_of_list(path: Path, text: str) -> Iterator[Task | None]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON ({error})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: is no list of prompts")
    for number, row in enumerate(rows, 1):
        yield _task_of(row, f"{path}, prompt {number}")


def _task_of(row: Any, where: str) -> Task | None:
    """Return the task of a row; None for a conversation in which no user speaks."""
    try:
        kind = str(row.get("kind") or row.get("category") or "")
        text = _text_of(row)
    except (KeyError, TypeError, IndexError, AttributeError):
        known = '"prompt", "turns" or "conversations"'
        raise DataError(f"{where}: is no object with {known}") from None
    return None if text is None else Task(text, kind)


def _text_of(row: dict[str, Any]) -> str | None:
    if "prompt" in row:
        return str(row["prompt"])
    if "turns" in row:
        return str(row["turns"][0])
    turns = row["messages"] if "messages" in row else row["conversations"]
    for turn in turns:
        if turn.get("from", turn.get("role")) in USERS:
            said = turn["value"] if "value" in turn else turn["content"]
            return str(said)
    return None
