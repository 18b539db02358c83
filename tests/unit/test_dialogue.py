"""Turns answered by ids or by text: answers stay as the model gave them, prompts are masked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from fake_vocabulary import EOS, Bytes

from model.base.chat import ChatTemplate, Message
from model.training.data.prompts import Prompt
from model.training.data.token_encoder import PartEncoder
from model.training.distillation.answers import DistilledAnswer
from model.training.distillation.dialogue import LEAST_ROOM, Dialogue, opening, prompt_seed
from model.training.distillation.transcript import answer_of_text

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}|{% endfor %}"
)
TURNS: tuple[Message, ...] = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "user", "content": "Q2"},
)


def start(prompt: Prompt, source: str | None = CHATML, space: bool = False) -> Dialogue:
    vocabulary = Bytes(space)
    return Dialogue(prompt, vocabulary, PartEncoder(vocabulary), ChatTemplate(source, eos="</s>"))


def parts(answer: DistilledAnswer) -> list[tuple[bool, str]]:
    """Pieces of an answer's ids as text, without its begin mark; whether the model said each."""
    assert answer.tokens[0] == 1
    said = np.zeros(len(answer.tokens), bool)
    for a, b in answer.spans:
        said[a:b] = True
    cuts = [1, *(np.flatnonzero(np.diff(said[1:])) + 2).tolist(), len(said)]
    return [(bool(said[a]), bytes(answer.tokens[a:b]).decode()) for a, b in pairwise(cuts)]


def test_each_turn_is_answered_in_the_light_of_the_models_own_answers() -> None:
    dialogue = start(Prompt(id="a", number=0, turns=TURNS))
    assert dialogue.ask(500)
    assert bytes(dialogue.ids[1:]).decode() == "<system>S\x02<user>Q1\x02<assistant>"
    # what the template would trim stays, as the model said it
    dialogue.answer([*b" A1\n", EOS], "stop")
    assert dialogue.ask(500)
    assert bytes(dialogue.ids[1:]).decode().endswith("<assistant> A1\n\x02<user>Q2\x02<assistant>")
    dialogue.answer([*b"A2"], "length")
    assert not dialogue.ask(500) and not dialogue.problem
    answer = dialogue.result(0.7)
    assert parts(answer) == [
        (False, "<system>S\x02<user>Q1\x02<assistant>"), (True, " A1\n\x02"),
        (False, "<user>Q2\x02<assistant>"), (True, "A2"),
    ]  # fmt: skip
    assert [(m["from"], m["value"]) for m in answer.conversations] == [
        ("system", "S"), ("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"),
    ]  # fmt: skip
    assert (answer.id, answer.temperature, answer.finish_reason) == ("a", 0.7, "length")


def test_an_answer_that_was_cut_off_gets_the_templates_end_mark_unlearnt() -> None:
    dialogue = start(Prompt(id="a", number=0, turns=TURNS[1:]))
    dialogue.ask(500)
    dialogue.answer([*b"half"], "length")
    dialogue.ask(500)
    dialogue.answer([*b"A2", EOS], "stop")
    assert parts(dialogue.result(0))[1:] == [
        (True, "half"),
        (False, "\x02<user>Q2\x02<assistant>"),
        (True, "A2\x02"),
    ]


@pytest.mark.parametrize("space", [False, True])
def test_vicuna_where_every_text_gets_a_space(space: bool) -> None:
    dialogue = start(Prompt(id="a", number=0, turns=TURNS[1:]), None, space)
    dialogue.ask(500)
    dialogue.answer([*b" A1", EOS], "stop")
    dialogue.ask(500)
    dialogue.answer([*b" A2", EOS], "stop")
    text = "".join(text for _, text in parts(dialogue.result(0)))
    lead = " " if space else ""
    assert (
        text.replace("\x02 ", "\x02")
        == f"{lead}USER: Q1 ASSISTANT: A1\x02USER: Q2 ASSISTANT: A2\x02"
    )


def test_a_template_that_rewrites_the_past_and_a_loop_end_the_conversation() -> None:
    # what was said stands there, but not where it was said
    again: Message = {"role": "user", "content": "Why A1?"}
    dialogue = start(Prompt(id="a", number=0, turns=(TURNS[1], again)), FORGETFUL)
    assert dialogue.ask(500)
    dialogue.answer([*b"A1", EOS], "stop")
    assert not dialogue.ask(500) and not dialogue.problem
    assert [m["value"] for m in dialogue.result(0).conversations] == ["Q1", "A1"]
    dialogue = start(Prompt(id="a", number=0, turns=TURNS[1:]))
    dialogue.ask(500)
    dialogue.answer([*b"la la la"], "loop")
    assert not dialogue.ask(500) and dialogue.result(0).finish_reason == "loop"


def test_what_cannot_be_asked_has_a_problem_or_ends_the_conversation() -> None:
    long = Prompt(id="a", number=0, turns=({"role": "user", "content": "x" * 100},))
    dialogue = start(long)
    assert not dialogue.ask(100) and "leaves no room for an answer within 100" in dialogue.problem
    refused = start(Prompt(id="a", number=0, turns=TURNS), "{{ raise_exception('no system') }}")
    assert not refused.ask(500) and "no system" in refused.problem
    later = start(Prompt(id="a", number=0, turns=(*TURNS, *long.turns)))
    for answer in (b"A1", b"A2"):
        assert later.ask(100)
        later.answer([*answer, EOS], "stop")
    assert not later.ask(100) and not later.problem
    assert [m["value"] for m in later.result(0).conversations] == ["S", "Q1", "A1", "Q2", "A2"]
    assert len(later.ids) + LEAST_ROOM < 100


@pytest.mark.parametrize(("length", "given"), [(0, "def f(x):"), (5, "def f")])
def test_plain_continuation(length: int, given: str) -> None:
    prompt = Prompt(id="a", number=0, text="def f(x):", length=length)
    dialogue = start(prompt)
    assert dialogue.ask(500)
    dialogue.answer([*b"\n    return x\n"], "length")
    assert not dialogue.ask(500)
    answer = dialogue.result(0)
    assert parts(answer) == [(False, given), (True, "\n    return x\n")]
    assert [m["value"] for m in answer.conversations] == [given, "\n    return x\n"]
    vocabulary = Bytes(space=True)
    assert opening(prompt, vocabulary, PartEncoder(vocabulary)) == (
        "def f(x):" if not length else "def "
    )


def test_a_prompt_without_tokens_is_a_problem() -> None:
    class NoBegin(Bytes):
        bos = -1

        def tokenize(
            self, text: str, *, add_bos: bool = True, parse_special: bool = False
        ) -> npt.NDArray[np.int32]:
            return super().tokenize(text, add_bos=False, parse_special=parse_special)

    vocabulary = NoBegin()
    dialogue = Dialogue(
        Prompt(id="a", number=0), vocabulary, PartEncoder(vocabulary), ChatTemplate(None)
    )
    assert not dialogue.ask(500) and "without a single token" in dialogue.problem


def test_seeds_belong_to_prompts() -> None:
    assert (
        len({prompt_seed(seed, key, turn) for seed in (0, 1) for key in "ab" for turn in (0, 1)})
        == 8
    )
    assert prompt_seed(0, "a", 0) == prompt_seed(0, "a", 0) >= 0


def of_text(prompt: Prompt, said: list[str], reasons: list[str], **more: bool) -> DistilledAnswer:
    messages: list[Message] = []
    if prompt.turns:
        for turn in prompt.turns:
            messages.append(turn)
            if turn["role"] == "user" and said:
                messages.append({"role": "assistant", "content": said.pop(0)})
    else:
        messages = [
            {"role": "user", "content": prompt.text},
            {"role": "assistant", "content": said[0]},
        ]
    vocabulary = Bytes()
    template = ChatTemplate(CHATML, eos="</s>")
    return answer_of_text(
        prompt, messages, reasons, vocabulary, PartEncoder(vocabulary), template, 1.0, **more
    )


def test_answers_that_came_as_text() -> None:
    prompt = Prompt(id="a", number=0, turns=TURNS)
    answer = of_text(prompt, ["half", "A2"], ["length", "stop"])
    assert parts(answer) == [
        (False, "<system>S\x02<user>Q1\x02<assistant>"), (True, "half"),
        (False, "\x02<user>Q2\x02<assistant>"), (True, "A2\x02"),
    ]  # fmt: skip
    assert parts(of_text(prompt, ["A1", "half"], ["stop", "length"]))[-1] == (True, "half")
    plain = of_text(Prompt(id="a", number=0, text="def f"), ["(x): pass"], ["stop"])
    assert parts(plain) == [(False, "def f"), (True, "(x): pass")]


def test_text_that_loops_ends_the_conversation() -> None:
    circle = "round and " * 40
    prompt = Prompt(id="a", number=0, turns=TURNS)
    answer = of_text(prompt, [circle, "A2"], ["stop", "stop"])
    assert answer.finish_reason == "loop" and parts(answer)[-1] == (True, "round and round a")
    assert [m["value"] for m in answer.conversations] == ["S", "Q1", "round and round a"]
    kept = of_text(prompt, [circle, "A2"], ["stop", "stop"], cut_loops=False)
    assert kept.finish_reason == "stop" and len(kept.spans) == 2


def test_text_whose_first_piece_grows_together_with_the_prompt() -> None:
    """Where a token spans the border, what the model said begins with that token."""

    class Pairs(Bytes):
        def tokenize(
            self, text: str, *, add_bos: bool = True, parse_special: bool = False
        ) -> npt.NDArray[np.int32]:
            pairs = [sum(text[i : i + 2].encode()) for i in range(0, len(text), 2)]
            return np.array([*([1] if add_bos else []), *pairs], np.int32)

    vocabulary = Pairs()
    messages: list[Message] = [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "def"},
    ]
    answer = answer_of_text(
        Prompt(id="a", number=0, text="abc"), messages, ["stop"], vocabulary,
        PartEncoder(vocabulary), ChatTemplate(None), 0.0, cut_loops=False,
    )  # fmt: skip
    assert answer.tokens == vocabulary.tokenize("abcdef").tolist() and answer.spans == [(2, 4)]
