"""A model's own questions: the opened user turn, what is dropped, and the file of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_base import FakeBase
from fake_vocabulary import BOS, EOS, Bytes

from model.base.chat import ChatTemplate
from model.errors import DataError
from model.training.data.token_encoder import PartEncoder
from model.training.distillation.question_file import Question, QuestionFile
from model.training.distillation.question_filter import QuestionFilter
from model.training.distillation.question_writer import QuestionStyle, QuestionWriter
from model.training.distillation.user_turn import open_user_turn

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
STYLE = QuestionStyle(language="English", temperatures=(0.8, 1.0), longest=120, seed=3)


class Ends(Bytes):
    """Bytes, of which many end a text: random ones have an end then."""

    eog = frozenset({EOS, *b".?!;:"})


def writer(source: str | None = CHATML, style: QuestionStyle = STYLE) -> QuestionWriter:
    vocabulary = Ends()
    return QuestionWriter(ChatTemplate(source), PartEncoder(vocabulary), vocabulary, style)


def write(path: Path, wanted: int, parallel: int = 4, stop_at: int = 10**9) -> QuestionFile:
    """Write questions of a made-up model; stop_at: as if killed after so many."""
    file = QuestionFile(path)
    questions = writer().write(
        FakeBase(n_vocab=128), 128, file, wanted, parallel=parallel, max_length=400
    )
    for question in questions:
        if question.number + 1 >= stop_at:
            break
    questions.close()
    return file


def test_the_turn_is_opened_and_ends_where_the_template_ends_it() -> None:
    vocabulary = Bytes()
    encoder = PartEncoder(vocabulary)
    turn = open_user_turn(ChatTemplate(CHATML), encoder, vocabulary, "S")
    assert turn.ids == [BOS, *b"<system>S", EOS, *b"<user>"]
    assert (turn.eog, turn.stop) == (frozenset({EOS}), ())
    assert turn.message(" Why?\n") == "Why?"
    # Vicuna's is text: a word ends the question, and the space before it is the model's to write.
    vicuna = open_user_turn(ChatTemplate(None), encoder, vocabulary)
    assert vicuna.ids == [BOS, *b"USER:"] and vicuna.stop == ("ASSISTANT:",)
    assert vicuna.message(" Why? ASSISTANT: So.") == "Why?"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ 'hello' }}", "nothing to open"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "nothing behind"),
        (NO_SYSTEM, "no system"),
    ],
)
def test_a_turn_that_cannot_be_opened_says_why(source: str, why: str) -> None:
    vocabulary = Bytes()
    with pytest.raises(DataError, match=why):
        open_user_turn(ChatTemplate(source), PartEncoder(vocabulary), vocabulary, "S")


def test_without_system_prompts_the_plain_turn_is_all_there_is() -> None:
    assert writer().steered and writer().sampling(0) != writer().sampling(12)
    assert not writer(NO_SYSTEM + CHATML).steered


LONG = "how do i bake a loaf of bread in a small oven at home"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LONG.upper() + "?", "exact duplicates"),
        (LONG + " today", "near duplicates"),
        ("hm?", "too short"),
        ("?!?!?!?!?!", "too short"),
        ("如何在家里的小烤箱里烤面包", "in another language"),
        ("go to the shop " * 6, "loops"),
        ("You are a helpful assistant who bakes bread.", "the system prompt read aloud"),
        ("how do i bake a cake in a large oven in the office", ""),
        ("What is 12 + 30?", ""),
    ],
)
def test_what_is_dropped_and_why(text: str, reason: str) -> None:
    system = "You are a helpful assistant who bakes bread."
    judge = QuestionFilter("English")
    assert judge.objection(LONG, "stop", system) == ""
    assert judge.objection(text, "stop", system) == reason
    assert judge.objection("What else is new here?", "length", system) == "without an end"
    assert judge.objection("What else is new here?", "loop", system) == "loops"


def test_other_languages_are_judged_by_their_own_words() -> None:
    judge = QuestionFilter("Chinese")
    assert judge.objection("如何在家里的小烤箱里烤面包", "stop", "") == ""
    assert judge.objection("如何在家里的小烤箱里烤面包?", "stop", "") == "exact duplicates"
    assert judge.objection("请把下面这段话翻译成英文给我看", "stop", "") == ""


def test_questions_are_the_same_however_many_are_written_at_once(tmp_path: Path) -> None:
    alone = write(tmp_path / "alone", 12, parallel=1)
    many = write(tmp_path / "many", 12, parallel=7)
    assert alone.questions == many.questions and len(alone.kept) == 12
    assert any(question.dropped for question in alone.questions)
    assert f"12 of {len(alone.questions)} kept; dropped: " in alone.summary()
    # Another seed asks otherwise: equality above is not for want of difference.
    other = QuestionFile(tmp_path / "other")
    style = QuestionStyle(language="English", temperatures=(0.8, 1.0), longest=120, seed=4)
    list(
        writer(style=style).write(FakeBase(n_vocab=128), 128, other, 12, parallel=4, max_length=400)
    )
    assert other.questions[0].text != alone.questions[0].text


def test_a_stopped_run_goes_on_to_the_same_questions(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", 12)
    half = write(tmp_path / "half", 12, stop_at=5)
    assert len(half.questions) == 5
    with (tmp_path / "half").open("a") as file:
        file.write('{"number": 5, "te')  # torn by a kill
    assert write(tmp_path / "half", 12).questions == whole.questions
    # Enough is there: nothing is written any more.
    assert write(tmp_path / "half", 12).questions == whole.questions


def test_a_broken_line_is_named_and_a_model_that_asks_nothing_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "q"
    path.write_text('{"number": 7, "text": "", "dropped": ""}\n{}\n')
    with pytest.raises(DataError, match="q, line 1: is no question"):
        QuestionFile(path)
    silent = QuestionFile(tmp_path / "silent")
    for number in range(256):
        silent.add(Question(number=number, text="", dropped="too short"))
    with pytest.raises(DataError, match=r"256 were dropped \(256: too short\); name prompts"):
        writer()._require_some(silent)
