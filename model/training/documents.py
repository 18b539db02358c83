"""Data sets in, documents out: Hugging Face, plain text, JSON lines, ShareGPT, Parquet, folders, the demo's own text.

Makes no tokens; those that `distill.py` has recorded come along as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.base.chat import Message
from model.errors import DataError

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
TEXT_COLUMNS = ("text", "content")
CHAT_COLUMNS = ("conversations", "messages", "conversation")
PAIR_COLUMNS = (("prompt", "response"), ("instruction", "output"), ("prompt", "completion"), ("question", "answer"))
RECORDED_COLUMNS = ("tokens", "answer_spans", "heads_fingerprint")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MAX_SOURCE_BYTES = 200_000  # of a Python file of the standard library: larger ones are tables, not code


@dataclass(frozen=True, eq=False)
class Recorded:
    """Ids of a text that a base model wrote. tokens: (T,) int32; mask: (T,) bool, True where it did.

    vocabulary: `GGUFFile.heads_fingerprint` of the model whose ids they are; base: its name.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    vocabulary: str
    base: str


@dataclass(frozen=True)
class Document:
    """A text or a conversation, with the place where it comes from; `problem`: why a record cannot be used."""

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    problem: str = ""
    recorded: Recorded | None = None


def held_out(name: str) -> bool:
    """Say whether a file of the standard library is held out from all training: one in fifty, by a hash of its path."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 50 == 0


def standard_library(root: Path | None = None, *, held: bool = False) -> Iterator[Document]:
    """Yield the demo's own text, the standard library's Python files, mixed by a hash of their paths.

    held: the files that are held out from all training, instead of the others.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    skipped = ("site-packages/", "dist-packages/", "encodings/", "lib2to3/tests/data/")
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(f"order {name}".encode()).digest()):
        path = root / name
        if name.startswith(skipped) or held_out(name) != held or not 200 <= path.stat().st_size <= MAX_SOURCE_BYTES:
            continue
        text = _read_text(path)
        if text is not None:
            yield Document(name, text)


def read_documents(dataset: str, split: str = "train") -> Iterator[Document]:
    """Yield the documents of a local file or folder, of a Hugging Face data set, or (no name) of the demo.

    Records that cannot be used come with their problem. Raises DataError where nothing is there, or where it has a
    form that is not known.
    """
    return (document_of(name, record) for name, record in read_records(dataset, split))


def read_records(dataset: str, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Yield the same as `read_documents`, raw: where a record comes from, and what it is. Texts are strings."""
    path = Path(dataset).expanduser()
    if not dataset:
        return ((document.name, document.text) for document in standard_library())
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if path.suffix in FORMATS or dataset.startswith(("/", ".", "~")):
        raise DataError(f"data set {dataset}: no such file or folder")
    return _hugging_face(dataset, split)


def _folder(root: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            name = path.relative_to(root).as_posix()
            if path.suffix in FORMATS[1:]:
                yield from _file(path)
            elif (text := _read_text(path)) is not None:
                yield name, text


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix not in FORMATS:
        raise DataError(f"data set {path}: unknown format {path.suffix!r}; use one of {' '.join(FORMATS)} or a folder")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    text = _read_text(path)
    if text is None:
        raise DataError(f"data set {path}: not readable as UTF-8 text")
    if path.suffix == ".txt":
        yield path.name, text
        return
    for number, record in _records(path, text):
        yield f"{path.name}:{number}", record


def _records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered records of JSON lines, or of one JSON array; a line that is no JSON as a DataError."""
    whole = path.suffix == ".json"
    lines = [text] if whole else text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if whole:
                raise DataError(f"data set {path}: not JSON ({error})") from error
            value = DataError(f"not JSON ({error})")  # one torn line is no reason to lose the others
        yield from enumerate(value, 1) if whole and isinstance(value, list) else [(number, value)]


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"data set {path}: not a readable Parquet file ({_one_line(error)})") from error


def _hugging_face(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each try; the error below says it once
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises dozens of types: network, names, splits, scripts
        hint = "neither a local path nor a Hugging Face data set that can be loaded"
        raise DataError(f"data set {name!r} (split {split!r}): {hint} ({_one_line(error)})") from error
    for number, record in enumerate(data):
        yield f"{name}:{number}", record


def document_of(name: str, record: Any) -> Document:
    """Make a document of one record: a text, a conversation, a prompt with its answer, or recorded ids."""
    if isinstance(record, DataError):
        return Document(name, problem=str(record))
    if isinstance(record, str):
        return Document(name, record)
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    if all(fields.get(column) is not None for column in RECORDED_COLUMNS):
        return _recorded(name, fields)
    for column in CHAT_COLUMNS:
        if isinstance(fields.get(column), list):
            return _conversation(name, fields[column])
    for ask, answer in PAIR_COLUMNS:
        if isinstance(fields.get(ask), str) and isinstance(fields.get(answer), str):
            asked = "\n\n".join(part for part in (fields[ask], fields.get("input") or "") if part)
            turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": fields[answer]})
            return Document(name, messages=turns)
    for column in TEXT_COLUMNS:
        if isinstance(fields.get(column), str):
            return Document(name, fields[column])
    found = ", ".join(fields) or type(record).__name__
    return Document(name, problem=f"neither text nor conversation in it (found: {found})")


def _conversation(name: str, turns: list[Any]) -> Document:
    """Make a document of turns."""
    try:
        messages = messages_of(turns)
    except DataError as error:
        return Document(name, problem=str(error))
    if not any(message["role"] == "assistant" for message in messages):
        return Document(name, problem="nobody answers in it")
    return Document(name, messages=messages)


def messages_of(turns: list[Any]) -> tuple[Message, ...]:
    """Return the messages of a conversation, ShareGPT's or OpenAI's; raises DataError where a turn cannot be used.

    What the assistant says before anyone has asked is left out.
    """
    messages: list[Message] = []
    for turn in turns:
        fields: dict[str, Any] = turn if isinstance(turn, dict) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"a turn has role {role!r:.80}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"a turn of role {role!r} holds no text")
        if ROLES[role] != "assistant" or any(message["role"] == "user" for message in messages):
            messages.append({"role": ROLES[role], "content": content})
    return tuple(messages)


def _recorded(name: str, fields: dict[str, Any]) -> Document:
    """Make a document of a line of an answers' file (`training/answers.py`)."""
    try:
        tokens, spans = np.array(fields["tokens"], np.int64), np.array(fields["answer_spans"], np.int64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        return Document(name, problem="its tokens or answer_spans are no lists of numbers")
    if tokens.ndim != 1 or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < 2**31):
        return Document(name, problem="its tokens are no ids")
    mask = np.zeros(len(tokens), np.bool_)
    for start, end in spans.tolist():
        if not 0 <= start < end <= len(tokens):
            return Document(name, problem=f"answer span {start} to {end} lies outside its {len(tokens)} tokens")
        mask[start:end] = True
    vocabulary, base = str(fields["heads_fingerprint"]), str(fields.get("base_name", "another model"))
    return Document(name, recorded=Recorded(tokens.astype(np.int32), mask, vocabulary, base))


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise DataError(f"data set {path}: cannot be read ({error.strerror})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
