"""Prompts as ids: BOS once, whoever writes it; ids untouched; control tokens read where asked."""

from __future__ import annotations

import pytest
from fake_vocabulary import BOS, EOS, Bytes

from model.base.chat import ChatTemplate, Message
from model.base.prompt import encode_prompt
from model.errors import DataError

TALK: list[Message] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "he"},
]
TURNS = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
ANSWER = "{% if add_generation_prompt %}A:{% endif %}"


class NoBos(Bytes):
    """A vocabulary whose GGUF says that no BOS is to be added."""

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = False):  # type: ignore[no-untyped-def]  # noqa: ANN201
        return super().tokenize(text, add_bos=False, parse_special=parse_special)


@pytest.mark.parametrize("ids", [[5, 6, 7], [BOS, BOS, 7], [EOS], []])
def test_ids_are_taken_as_they_are(ids: list[int]) -> None:
    encoded = encode_prompt(Bytes(), ids, ChatTemplate(TURNS))
    assert encoded == ids and encoded is not ids


def test_text_gets_bos_as_the_file_says() -> None:
    assert encode_prompt(Bytes(), "ab") == [BOS, *b"ab"]
    assert encode_prompt(NoBos(), "ab") == [*b"ab"]
    assert encode_prompt(Bytes(), "") == [BOS]


def test_control_tokens_in_text_are_read_on_demand_alone() -> None:
    assert encode_prompt(Bytes(), "a</s>b") == [BOS, *b"a</s>b"]
    assert encode_prompt(Bytes(), "a</s>b", parse_special=True) == [BOS, *b"a", EOS, *b"b"]


def test_a_text_that_writes_bos_itself_is_not_ours_to_change() -> None:
    assert encode_prompt(Bytes(), "<s>a", parse_special=True) == [BOS, BOS, *b"a"]


@pytest.mark.parametrize("vocabulary", [Bytes(), NoBos()])
def test_a_template_that_writes_bos_makes_one(vocabulary: Bytes) -> None:
    template = ChatTemplate("{{ bos_token }}" + TURNS + ANSWER, bos="<s>")
    conversation = [BOS, *b"hi", EOS, *b"ho", EOS, *b"he", EOS, *b"A:"]
    assert encode_prompt(vocabulary, TALK, template) == conversation


def test_a_template_without_bos_gets_the_files() -> None:
    template = ChatTemplate(TURNS + ANSWER)
    conversation = [*b"hi", EOS, *b"ho", EOS, *b"he", EOS, *b"A:"]
    assert encode_prompt(Bytes(), TALK, template) == [BOS, *conversation]
    assert encode_prompt(NoBos(), TALK, template) == conversation


def test_only_the_second_bos_at_the_start_goes() -> None:
    template = ChatTemplate("{% for m in messages %}<s>{{ m.content }}{% endfor %}")
    conversation = [BOS, *b"hi", BOS, *b"ho", BOS, *b"he"]
    assert encode_prompt(Bytes(), TALK, template) == conversation


def test_without_a_template_a_conversation_is_one_text() -> None:
    assert encode_prompt(Bytes(), TALK) == [BOS, *b"hihohe"]
    marked: list[Message] = [{"role": "user", "content": "</s>"}]
    assert encode_prompt(Bytes(), marked) == [BOS, *b"</s>"]


def test_what_a_template_refuses_is_an_error() -> None:
    with pytest.raises(DataError, match="refuses a conversation in line 1: roles must alternate"):
        encode_prompt(Bytes(), TALK, ChatTemplate("{{ raise_exception('roles must alternate') }}"))
