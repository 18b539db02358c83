"""Prompt files: the project's own, and those that come as MT-bench, Spec-Bench and ShareGPT."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from model.errors import DataError
from model.planning.prompt_files import (
    PYTHON,
    PYTHON_TRIALS,
    TASK_TRIALS,
    TASKS,
    Task,
    in_turn,
    read_prompt_file,
    read_tasks,
)

KINDS = ["chat", "code", "maths", "summary", "text QA", "rewriting"]


@pytest.mark.parametrize(("path", "each"), [(TASKS, 8), (TASK_TRIALS, 3)])
def test_the_tasks_that_ship_are_of_six_kinds(path: Path, each: int) -> None:
    tasks = read_tasks(path)
    assert Counter(task.kind for task in tasks) == dict.fromkeys(KINDS, each)
    for task in tasks:
        has_text = task.kind in KINDS[3:]
        assert (150 <= len(task.text.split()) <= 400) == has_text, task


def test_nothing_that_is_compared_on_is_measured_on() -> None:
    texts = [
        paragraph
        for path in (TASKS, TASK_TRIALS)
        for task in read_tasks(path)
        for paragraph in task.text.split("\n\n")
    ]
    assert len(texts) == len(set(texts)) > 66
    assert not set(read_prompt_file(PYTHON)) & set(read_prompt_file(PYTHON_TRIALS))
    assert {task.kind for task in read_tasks(PYTHON)} == {""}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]},
    {"id": "d", "conversations": []},
    {"conversations": [{"from": "gpt", "value": "e"}, {"from": "human", "value": "f"}]},
    {"messages": [{"role": "system", "content": "g"}, {"role": "user", "content": "h"}]},
]


def test_files_of_others_are_taken_as_they_come(tmp_path: Path) -> None:
    mt_bench = {"question_id": 81, "category": "writing", "turns": ["a", "b"]}
    spec_bench = {"question_id": 9, "category": "rag", "turns": ["c"], "reference": []}
    file = write(tmp_path / "question.jsonl", mt_bench, spec_bench, {"prompt": "d", "kind": "e"})
    assert read_tasks(file) == [Task("a", "writing"), Task("c", "rag"), Task("d", "e")]
    said = ["b", "f", "h"]  # of the conversations in which a user speaks
    assert read_prompt_file(write(tmp_path / "chats.jsonl", *SHAREGPT)) == said
    (tmp_path / "chats.json").write_text(json.dumps(SHAREGPT))
    assert read_prompt_file(tmp_path / "chats.json") == said
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert read_tasks(tmp_path / "lines.txt") == [Task("one"), Task("two")]


@pytest.mark.parametrize("wrong", ['{"text": "a"}', '{"prompt": "a', "[]", '{"turns": []}', "7"])
def test_a_row_that_is_no_prompt_is_named(wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n\n{wrong}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:3: is no object"):
        read_tasks(file)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", "", "no prompts"),
        ("p.json", "[", "is no JSON"),
        ("p.json", "{}", "is no list"),
        ("p.json", '[{"conversations": []}]', "no prompts"),
        ("p.json", '[{"prompt": "a"}, 7]', "prompt 2: is no object"),
    ],
)
def test_files_without_prompts(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_tasks(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        read_tasks(tmp_path / "nowhere.jsonl")


def test_the_first_ones_are_of_all_kinds() -> None:
    tasks = [Task(text, text[0]) for text in ("a1", "a2", "a3", "b1", "c1", "c2")]
    assert [task.text for task in in_turn(tasks)] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    alike = [Task("x"), Task("y"), Task("z")]
    assert in_turn(alike) == alike
    assert [task.kind for task in in_turn(read_tasks(TASKS))[:6]] == KINDS
