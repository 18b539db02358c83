"""Records in, prompts out: what the base model is to answer when heads are to learn its own words.

A conversation gives its users' turns, a prompt is one turn, and of a text pieces are cut that the
model goes on with. Knows neither tokens nor templates.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from model.base.chat import Message, user_turn
from model.errors import DataError
from model.training.data.documents import (
    CHAT_COLUMNS,
    PAIR_COLUMNS,
    TEXT_COLUMNS,
    messages_of,
    question_of,
)
from model.training.data.records import Record

PROMPT_COLUMNS = tuple(ask for ask, _ in PAIR_COLUMNS)
SPACING = 2000  # characters of a text for which one piece is cut out of it
PER_TOKEN = 8  # characters cut for each token wanted: more than nearly all tokenizers make one of
NEAR = 200  # characters within which a line or a word must begin for a piece to begin there


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Turns of users (and of the system) to be answered one by one, or the beginning of a text.

    id: its place and a piece of its content's hash: the same in each run, another one where the
    content changed. number: from 0. length: take so many tokens of `text`; 0: all.
    """

    id: str
    number: int
    text: str = ""
    turns: tuple[Message, ...] = ()
    length: int = 0


def make_prompts(
    records: Iterable[Record],
    *,
    chat: bool,
    lengths: tuple[int, int],
    seed: int = 0,
    most: int = 0,
) -> tuple[list[Prompt], list[str]]:
    """Return the prompts, and why records cannot be used; whole prompts before pieces of texts.

    chat: whether the model takes turns; otherwise a conversation's first question is the beginning
    of a text. lengths: shortest and longest piece in tokens. most: stop there (0: take all).
    """
    prompts: dict[str, Prompt] = {}
    problems: list[str] = []
    texts: list[tuple[str, str]] = []
    limit = most or float("inf")

    # Questions are prompts as they are; texts are put aside.
    for name, record in records:
        if len(prompts) >= limit:
            break
        try:
            asked = _asked(record)
        except DataError as error:
            problems.append(f"{name}: {error}")
            continue
        if isinstance(asked, str):
            texts.append((name, asked))
        elif chat:
            _add(prompts, name, turns=asked)
        else:
            question = next(turn["content"] for turn in asked if turn["role"] == "user")
            _add(prompts, name, text=question)

    # Pieces of the texts, as far as more prompts are wanted.
    for name, piece, length in _pieces(texts, lengths, seed):
        if len(prompts) >= limit:
            break
        _add(prompts, name, text=piece, length=length)
    return list(prompts.values()), problems


def own_prompt(number: int, written: int, question: str) -> Prompt:
    """Return a question of the model's own; number: among those kept, written: among all."""
    digest = hashlib.sha256(question.encode(errors="replace")).hexdigest()
    turn = user_turn(question)
    return Prompt(id=f"own-{written}-{digest[:8]}", number=number, turns=(turn,))


def _add(prompts: dict[str, Prompt], name: str, **content: Any) -> None:
    """Add a prompt under its id; the same content from the same place is there already."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    key = f"{name}-{digest[:8]}"
    prompts.setdefault(key, Prompt(id=key, number=len(prompts), **content))


def _asked(record: Any) -> str | tuple[Message, ...]:
    """Return the turns of a record but the assistant's, or its text.

    Raises DataError where it holds neither.
    """
    if isinstance(record, DataError):
        raise record
    fields: dict[str, Any] = record if isinstance(record, dict) else {"text": record}
    if isinstance(fields.get("turns"), list):  # MT-bench's
        turns = [user_turn(turn) for turn in fields["turns"]]
        return _asking(messages_of(turns))
    for column in CHAT_COLUMNS:
        if isinstance(fields.get(column), list):
            return _asking(messages_of(fields[column]))
    for column in PROMPT_COLUMNS:
        if isinstance(fields.get(column), str):
            return _asking((user_turn(question_of(fields, column)),))
    for column in TEXT_COLUMNS:
        if isinstance(fields.get(column), str) and fields[column].strip():
            return str(fields[column])
    raise DataError(f"no prompt in it (found: {', '.join(fields)})")


def _asking(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Leave out what the assistant said; raises DataError where nobody asks anything."""
    asked = tuple(message for message in messages if message["role"] != "assistant")
    questions = [message["content"] for message in asked if message["role"] == "user"]
    if not questions:
        raise DataError("nobody asks in it")
    if not all(question.strip() for question in questions):
        raise DataError("a question in it is empty")
    return asked


def _pieces(
    texts: list[tuple[str, str]], lengths: tuple[int, int], seed: int
) -> Iterator[tuple[str, str, int]]:
    """Cut pieces at random places, one of each text in turn, more of longer ones.

    Yields place, piece and tokens that are wanted of it.
    """
    turn = 0
    while texts:
        for name, text in texts:
            chance = random.Random(f"{seed} {turn} {name}")
            length = chance.randint(*lengths)
            n_characters = PER_TOKEN * length
            start = _beginning(text, chance.randrange(max(1, len(text) - n_characters)))
            yield f"{name}@{start}", text[start : start + n_characters], length
        turn += 1
        texts = [(name, text) for name, text in texts if len(text) >= turn * SPACING]


def _beginning(text: str, at: int) -> int:
    """Return the next place where a line begins, or else a word."""
    if at == 0:
        return 0
    line = text.find("\n", at, at + NEAR)
    if line >= 0:
        return line + 1
    word = text.find(" ", at, at + NEAR)
    return word if word >= 0 else at
