"""The file of answers: its contents, what a kill leaves, who may write, how training reads it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_vocabulary import Bytes

from model.base.chat import ChatTemplate
from model.errors import DataError, OutputError
from model.training.data.documents import read_documents
from model.training.data.samples import make_samples
from model.training.distillation.answers import AnswerFile, DistilledAnswer

FACTS = {"base_name": "one", "base_fingerprint": "f" * 64, "heads_fingerprint": "0123456789abcdef"}
IDENTITY: dict[str, Any] = {"base model": "one", "--temperature": (0.0, 0.7), "--seed": 0}


def answer(
    key: str, temperature: float = 0.0, reason: str = "stop", said: bytes = b"four."
) -> DistilledAnswer:
    talk = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": said.decode()}]
    return DistilledAnswer(
        id=key, conversations=talk, tokens=[1, *b"2 + 2: ", *said, 2],
        spans=[(8, 9 + len(said))], temperature=temperature, finish_reason=reason,
    )  # fmt: skip


def write(path: Path, *answers: DistilledAnswer, **changed: Any) -> set[str]:
    """Add answers; return the ids that were there before."""
    with AnswerFile(path=path, facts=FACTS, identity={**IDENTITY, **changed}) as file:
        done = set(file.done)
        for one in answers:
            file.add(one)
    return done


def test_lines_are_sharegpt_with_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, answer("é", said=b"ab" * 20))
    (line,) = (json.loads(text) for text in path.read_text().splitlines())
    assert line["id"] == "é" and line["conversations"] == answer("é", said=b"ab" * 20).conversations
    assert bytes(line["tokens"][slice(*line["answer_spans"][0])]) == b"ab" * 20 + b"\x02"
    assert line["repeated_8grams"] == round(31 / 34, 6)
    assert {key: line[key] for key in FACTS} == FACTS


def test_a_run_goes_on_and_counts_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.jsonl"
    assert write(path, answer("a"), answer("b", 0.7, "loop", b"ab" * 20)) == set()
    assert write(path, answer("c")) == {"a", "b"}
    with AnswerFile(path=path, facts=FACTS, identity=IDENTITY) as file:
        assert file.done == {"a", "b", "c"}
        cold = file.by_temperature[0.0]
        warm = file.by_temperature[0.7]
        assert (cold.answers, cold.tokens, cold.grams, cold.loops) == (2, 12, 0, 0)
        assert (warm.answers, warm.tokens, warm.grams, warm.loops) == (1, 41, 34, 1)
        assert warm.share_repeated == 31 / 34


@pytest.mark.parametrize(
    "torn", [b'{"id": "c", "conv', b"{", json.dumps({"id": "c"}).encode(), b"\xff\xfe\n"]
)
def test_a_torn_last_line_goes(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    write(path, answer("a"), answer("b"))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert write(path) == {"a", "b"}
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # even the mere end of the line
    assert write(path, answer("b")) == {"a"}
    assert path.read_bytes() == whole


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, answer("a"))
    path.write_bytes(b"broken\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: is no answer"):
        write(path)


def test_other_options_are_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path)
    write(path, answer("a"), **{"--seed": 1})  # nothing was there yet
    with pytest.raises(DataError, match=r"--seed 1 then, 0 now; name another --output$"):
        write(path)
    path.with_name(".a.jsonl.run").joinpath("options.json").unlink()
    with pytest.raises(DataError, match="no telling how it was begun"):
        write(path)
    with pytest.raises(OutputError, match="is a folder"):
        write(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "file" / "a.jsonl")


def test_a_second_writer_is_told_of_the_first(tmp_path: Path) -> None:
    with AnswerFile(path=tmp_path / "a.jsonl", facts=FACTS, identity=IDENTITY) as file:
        with pytest.raises(DataError, match=f"process {os.getpid()} is writing there"):
            write(tmp_path / "a.jsonl")
        write(tmp_path / "b.jsonl", answer("b"))  # its neighbour is not meant
        file.add(answer("a"))
    assert write(tmp_path / "a.jsonl") == {"a"}


def test_text_that_is_no_unicode_is_written_all_the_same(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "\ud83d"}, {"from": "gpt", "value": "x"}]
    half = replace(answer("a"), conversations=talk, tokens=[5, 6], spans=[(1, 2)])
    write(tmp_path / "a.jsonl", half)
    assert write(tmp_path / "a.jsonl") == {"a"}


def samples_of(
    path: Path, vocabulary: str = FACTS["heads_fingerprint"], max_length: int = 64, base: str = ""
) -> list[Any]:
    documents = read_documents(str(path))
    return make_samples(
        documents, Bytes(), ChatTemplate(None), max_length, vocabulary=vocabulary, base=base
    )


def test_training_takes_the_ids_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    odd = replace(answer("b"), tokens=[1, 9, 8, 7, 6, 200], spans=[(3, 4), (5, 6)])
    write(path, answer("a"), odd)
    one, two = samples_of(path)
    assert one.tokens.tolist() == answer("a").tokens and two.tokens.tolist() == odd.tokens
    assert np.flatnonzero(one.mask).tolist() == list(range(8, 14)), "the answer and its end mark"
    assert np.flatnonzero(two.mask).tolist() == [3, 5]
    cut = samples_of(path, max_length=10)
    assert [s.tokens.tolist() for s in cut[:2]] == [[1, *b"2 + 2: fo"], [1, *b"ur.", 2]]
    assert [s.mask.tolist() for s in cut[:2]] == [[False] * 8 + [True] * 2, [False] + [True] * 4]


def test_answers_of_another_model_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.jsonl", answer("a"), answer("b"))
    for base, told in (
        ("one", ""),
        ("two", "answers of one: heads for two learn best from its own\n"),
    ):
        assert len(samples_of(tmp_path / "a.jsonl", base=base)) == 2
        assert capsys.readouterr().err == told


@pytest.mark.parametrize("vocabulary", ["", "fedcba98765432100"])
def test_ids_of_another_vocabulary_are_refused(tmp_path: Path, vocabulary: str) -> None:
    write(tmp_path / "a.jsonl", answer("a"))
    with pytest.raises(
        DataError, match=f"ids of one .*0123456789ab.*{vocabulary[:12] or 'unknown'}"
    ) as error:
        samples_of(tmp_path / "a.jsonl", vocabulary)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tokens": "abc"}, "no lists of numbers"),
        ({"tokens": [1, -5, 3]}, "no ids"),
        ({"tokens": [[1], [2]]}, "no ids"),
        ({"tokens": [1, 2**40]}, "no ids"),
        ({"answer_spans": [[3, 99]]}, "outside"),
        ({"answer_spans": [[5, 5]]}, "outside"),
        ({"answer_spans": [1, 2, 3]}, "no lists"),
    ],
)
def test_damaged_lines_are_skipped_and_named(
    tmp_path: Path, changed: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    write(path, answer("a"), answer("b"))
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + json.dumps({**json.loads(second), **changed}))
    assert len(samples_of(path)) == 1
    told = capsys.readouterr().err
    assert "records skipped: 1" in told and "a.jsonl:2" in told and says in told
