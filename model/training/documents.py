"""Data sets in, documents out: Hugging Face, plain text, JSON lines, ShareGPT, Parquet, folders, the demo's own text.

Knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.base.chat import Message
from model.errors import DataError

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
TEXT_COLUMNS = ("text", "content")
CHAT_COLUMNS = ("conversations", "messages", "conversation")
PAIR_COLUMNS = (("prompt", "response"), ("instruction", "output"), ("prompt", "completion"), ("question", "answer"))
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MAX_SOURCE_BYTES = 200_000  # of a Python file of the standard library: larger ones are tables, not code


@dataclass(frozen=True)
class Document:
    """A text or a conversation, with the place where it comes from; `problem`: why a record cannot be used."""

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    problem: str = ""


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
    path = Path(dataset).expanduser()
    if not dataset:
        return standard_library()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if path.suffix in FORMATS or dataset.startswith(("/", ".", "~")):
        raise DataError(f"data set {dataset}: no such file or folder")
    return _hugging_face(dataset, split)


def _folder(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            name = path.relative_to(root).as_posix()
            if path.suffix in FORMATS[1:]:
                yield from _file(path)
            elif (text := _read_text(path)) is not None:
                yield Document(name, text)


def _file(path: Path) -> Iterator[Document]:
    if path.suffix not in FORMATS:
        raise DataError(f"data set {path}: unknown format {path.suffix!r}; use one of {' '.join(FORMATS)} or a folder")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    text = _read_text(path)
    if text is None:
        raise DataError(f"data set {path}: not readable as UTF-8 text")
    if path.suffix == ".txt":
        yield Document(path.name, text)
        return
    for number, record in _records(path, text):
        yield _document(f"{path.name}:{number}", record)


def _records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered records of JSON lines, or of one JSON array."""
    whole = path.suffix == ".json"
    lines = [text] if whole else text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"data set {path}, line {number}: not JSON ({error})") from error
        yield from enumerate(value, 1) if whole and isinstance(value, list) else [(number, value)]


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield _document(f"{path.name}:{number}", record)
    except pyarrow.ArrowException as error:
        raise DataError(f"data set {path}: not a readable Parquet file ({_one_line(error)})") from error


def _hugging_face(name: str, split: str) -> Iterator[Document]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises dozens of types: network, names, splits, scripts
        hint = "neither a local path nor a Hugging Face data set that can be loaded"
        raise DataError(f"data set {name!r} (split {split!r}): {hint} ({_one_line(error)})") from error
    for number, record in enumerate(data):
        yield _document(f"{name}:{number}", record)


def _document(name: str, record: Any) -> Document:
    """Make a document of one record: a text, a conversation, or a prompt with its answer."""
    if isinstance(record, str):
        return Document(name, record)
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
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
    """Make a document of turns; what the assistant says before anyone has asked is left out."""
    messages: list[Message] = []
    for turn in turns:
        fields: dict[str, Any] = turn if isinstance(turn, dict) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            return Document(name, problem=f"a turn has role {role!r:.80}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            return Document(name, problem=f"a turn of role {role!r} holds no text")
        if ROLES[role] != "assistant" or any(message["role"] == "user" for message in messages):
            messages.append({"role": ROLES[role], "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        return Document(name, problem="nobody answers in it")
    return Document(name, messages=tuple(messages))


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise DataError(f"data set {path}: cannot be read ({error.strerror})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
