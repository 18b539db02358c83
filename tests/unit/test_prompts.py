"""Records in, prompts out: forms, ids, pieces of texts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from model.training.data.prompts import Prompt, make_prompts
from model.training.data.records import read_records
from model.training.data.standard_library import held_out

CHAT = [
    {"from": "system", "value": "Be short."},
    {"from": "human", "value": "Q1"},
    {"from": "gpt", "value": "A1"},
    {"from": "human", "value": "Q2"},
]
RECORDS: list[Any] = [
    {"conversations": CHAT},
    {"messages": [{"role": "user", "content": "Q3"}, {"role": "assistant", "content": "A3"}]},
    {"question_id": 81, "category": "writing", "turns": ["Q4", "Q5"]},
    {"prompt": "Q6"},
    {"instruction": "Q7", "input": "given", "output": "A7"},
    {"question": "Q8", "answer": "A8"},
    {"text": "Once upon a time"},
    {"content": "def f"},
]
WORDS = " ".join(f"w{i}" for i in range(3000))


def read(records: list[Any], **more: Any) -> tuple[list[Prompt], list[str]]:
    named = ((f"r:{i}", record) for i, record in enumerate(records))
    return make_prompts(named, **{"chat": True, "lengths": (20, 30), **more})


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_forms(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"prompts.{form}"
    path.write_text(
        json.dumps(RECORDS) if form == "json" else "\n".join(json.dumps(r) for r in RECORDS)
    )
    prompts, problems = make_prompts(read_records(str(path)), chat=True, lengths=(64, 128))
    assert problems == []
    asked = [[turn["content"] for turn in prompt.turns] for prompt in prompts]
    assert asked == [
        ["Be short.", "Q1", "Q2"],
        ["Q3"],
        ["Q4", "Q5"],
        ["Q6"],
        ["Q7\n\ngiven"],
        ["Q8"],
        [],
        [],
    ]
    assert [prompt.text for prompt in prompts[-2:]] == ["Once upon a time", "def f"]
    assert all(turn["role"] != "assistant" for prompt in prompts for turn in prompt.turns)
    assert [prompt.number for prompt in prompts] == list(range(8))
    assert prompts[0].id.startswith(f"prompts.{form}:1-")


def test_a_model_without_turns_goes_on_with_the_first_question() -> None:
    prompts, _ = read(RECORDS[:4], chat=False)
    assert [(prompt.text, prompt.turns, prompt.length) for prompt in prompts] == [
        (question, (), 0) for question in ("Q1", "Q3", "Q4", "Q6")
    ]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"foo": 1}, "found: foo"),
        ({"text": "  "}, "no prompt"),
        ({"turns": ["Q", None]}, "holds no text"),
        ({"turns": []}, "nobody asks"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "role 'tool'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "nobody asks"),
        ({"prompt": " "}, "empty"),
        (None, "no prompt"),
        ([1], "no prompt"),
    ],
)
def test_bad_records_are_named_and_the_rest_goes_on(record: Any, says: str) -> None:
    prompts, problems = read([RECORDS[3], record, RECORDS[5]])
    assert [prompt.turns[0]["content"] for prompt in prompts] == ["Q6", "Q8"]
    (problem,) = problems
    assert problem.startswith("r:1: ") and says in problem


def test_ids_follow_the_content() -> None:
    one, again, other = (read([{"prompt": text}])[0][0].id for text in ("a", "a", "b"))
    assert one == again != other


def test_pieces_are_cut_from_all_texts_in_turn_and_begin_with_a_word() -> None:
    texts = [WORDS, WORDS.replace(" ", "\n"), "short one"]
    prompts, _ = read(texts, most=5)
    assert [prompt.id.split("@")[0] for prompt in prompts] == ["r:0", "r:1", "r:2", "r:0", "r:1"]
    everything, _ = read(texts)
    assert len(everything) == len({prompt.id for prompt in everything}) > 10
    assert everything[:5] == prompts, "a limit changes nothing but the number"
    for prompt in everything:
        assert 20 <= prompt.length <= 30
        assert prompt.text.lstrip(" ") == "short one" or (
            prompt.text.lstrip(" ")[0] == "w" and len(prompt.text) > 150
        )
        assert any(prompt.text in text for text in texts)
    assert len({prompt.length for prompt in everything}) > 3
    assert read(texts, seed=1)[0] != everything


def test_whole_prompts_come_before_pieces() -> None:
    prompts, _ = read([WORDS, {"prompt": "Q"}], most=2)
    assert [bool(prompt.turns) for prompt in prompts] == [True, False]


def test_the_demo_text_has_no_held_out_file() -> None:
    records = itertools.islice(read_records(""), 150)
    prompts, problems = make_prompts(records, chat=False, lengths=(64, 128), most=150)
    names = {prompt.id.split("@")[0] for prompt in prompts}
    assert len(names) == 150 and not problems
    assert not any(held_out(name) for name in names)
