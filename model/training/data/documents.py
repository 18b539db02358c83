"""Records in, documents out: text, a conversation, a prompt with its answer, or recorded ids.

Makes no tokens; those that `distill.py` has recorded come along as they are. Knows no file formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.base.chat import Message, user_turn
from model.errors import DataError
from model.training.data.records import read_records

TEXT_COLUMNS = ("text", "content")
CHAT_COLUMNS = ("conversations", "messages", "conversation")
PAIR_COLUMNS = (
    ("prompt", "response"), ("instruction", "output"), ("prompt", "completion"),
    ("question", "answer"),
)  # fmt: skip
RECORDED_COLUMNS = ("tokens", "answer_spans", "heads_fingerprint")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Recorded:
    """Ids of a text that a base model wrote.

    tokens: (T,) int32; mask: (T,) bool, True where it did.

    vocabulary: `GGUFFile.heads_fingerprint` of the model whose ids they are; base: its name.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    vocabulary: str
    base: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text or a conversation. name: where it comes from; problem: why a record cannot be used."""

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    problem: str = ""
    recorded: Recorded | None = None


def read_documents(dataset: str, split: str = "train") -> Iterator[Document]:
    """Yield the documents of a data set; see `read_records` for what that can be.

    Records that cannot be used come with their problem. Raises DataError where nothing is there, or
    where it has a form that is not known.
    """
    return (document_of(name, record) for name, record in read_records(dataset, split))


def document_of(name: str, record: Any) -> Document:
    """Make a document of one record."""
    if isinstance(record, DataError):
        return Document(name=name, problem=str(record))
    if isinstance(record, str):
        return Document(name=name, text=record)
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    if all(fields.get(column) is not None for column in RECORDED_COLUMNS):
        return _recorded(name, fields)
    for column in CHAT_COLUMNS:
        if isinstance(fields.get(column), list):
            return _conversation(name, fields[column])
    for ask, answer in PAIR_COLUMNS:
        if isinstance(fields.get(ask), str) and isinstance(fields.get(answer), str):
            asked: Message = user_turn(question_of(fields, ask))
            answered: Message = {"role": "assistant", "content": fields[answer]}
            return Document(name=name, messages=(asked, answered))
    for column in TEXT_COLUMNS:
        if isinstance(fields.get(column), str):
            return Document(name=name, text=fields[column])
    found = ", ".join(fields) or type(record).__name__
    return Document(name=name, problem=f"neither text nor conversation in it (found: {found})")


def question_of(fields: dict[str, Any], column: str) -> str:
    """Return the question in a column of a record, with its "input" where it has one (Alpaca's)."""
    return "\n\n".join(part for part in (fields[column], fields.get("input") or "") if part)


def messages_of(turns: list[Any]) -> tuple[Message, ...]:
    """Return the messages of a conversation, ShareGPT's or OpenAI's.

    What the assistant says before anyone has asked is left out. Raises DataError where a turn
    cannot be used.
    """
    messages: list[Message] = []
    asked = False
    for turn in turns:
        fields: dict[str, Any] = turn if isinstance(turn, dict) else {}
        role = fields.get("role", fields.get("from"))
        content = fields.get("content", fields.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"a turn has role {role!r:.80}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"a turn of role {role!r} holds no text")
        asked = asked or ROLES[role] == "user"
        if asked or ROLES[role] != "assistant":
            messages.append({"role": ROLES[role], "content": content})
    return tuple(messages)


def _conversation(name: str, turns: list[Any]) -> Document:
    """Make a document of turns."""
    try:
        messages = messages_of(turns)
    except DataError as error:
        return Document(name=name, problem=str(error))
    if not any(message["role"] == "assistant" for message in messages):
        return Document(name=name, problem="nobody answers in it")
    return Document(name=name, messages=messages)


def _recorded(name: str, fields: dict[str, Any]) -> Document:
    """Make a document of a line of an answers' file (`training/distillation/answers.py`)."""
    try:
        tokens = np.array(fields["tokens"], np.int64)
        spans = np.array(fields["answer_spans"], np.int64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        return Document(name=name, problem="its tokens or answer_spans are no lists of numbers")
    if tokens.ndim != 1 or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < 2**31):
        return Document(name=name, problem="its tokens are no ids")
    mask = np.zeros(len(tokens), np.bool_)
    for start, end in spans.tolist():
        if not 0 <= start < end <= len(tokens):
            outside = f"answer span {start} to {end} lies outside its {len(tokens)} tokens"
            return Document(name=name, problem=outside)
        mask[start:end] = True
    recorded = Recorded(
        tokens=tokens.astype(np.int32),
        mask=mask,
        vocabulary=str(fields["heads_fingerprint"]),
        base=str(fields.get("base_name", "another model")),
    )
    return Document(name=name, recorded=recorded)
