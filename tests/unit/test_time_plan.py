"""How a given time is shared between writing and learning, and what a timed run remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.errors import UsageError
from model.training.answer_writer import Amount, amount_of, is_answered
from model.training.time_plan import Costs, tokens_to_write
from model.training.timed_record import TimedRecord

COSTS = Costs(write_s=0.004, prepare_s=0.003, learn_s=0.002)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("there", [0, 10_000])
def test_the_time_is_used_up(passes: int, there: int) -> None:
    n = tokens_to_write(1000.0, there, COSTS, passes)
    spent_s = (n - there) * COSTS.write_s + n * (COSTS.prepare_s + passes * COSTS.learn_s)
    assert spent_s == pytest.approx(1000.0, abs=0.02)


def test_what_is_there_stays_where_no_time_is_left() -> None:
    assert tokens_to_write(1.0, 10_000, COSTS, 3) == 10_000


def test_answers_are_counted_but_not_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    assert amount_of(path) == Amount(0, 0) and not is_answered(path)
    lines = [json.dumps({"tokens": [1] * n, "answer_spans": []}) for n in (5, 7)]
    path.write_text("\n".join(lines) + '\n{"tokens": [1, 2')
    assert amount_of(path) == Amount(2, 12) and is_answered(path)
    path.write_text('{"prompt": "x"}\n')
    assert not is_answered(path)


def test_a_record_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert TimedRecord.load(path) == TimedRecord()
    record = TimedRecord(spent_s=3.5, written_s=1.0, training="9 bytes")
    record.save(path)
    assert TimedRecord.load(path) == record
    path.write_text('{"spent": 1}')
    with pytest.raises(UsageError, match=r"record\.json"):
        TimedRecord.load(path)
