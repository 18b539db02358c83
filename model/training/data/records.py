"""Data sets in, raw records out.

Hugging Face, plain text, JSON and JSON lines, Parquet, folders, the demo's text. A record is a
string, or what JSON or Parquet holds. Knows nothing of what a record means.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.errors import DataError, one_line
from model.training.data.standard_library import standard_library

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
Record = tuple[str, Any]  # where it comes from, and what it is: a DataError where it can't be read


def read_records(dataset: str, split: str = "train") -> Iterator[Record]:
    """Yield the records of a local file or folder, a Hugging Face data set, or (no name) the demo.

    Raises DataError where nothing is there, or where it has a form that is not known.
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


def _folder(root: Path) -> Iterator[Record]:
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not path.is_file():
            continue
        if path.suffix in FORMATS[1:]:
            yield from _file(path)
            continue
        text = _read_text(path)
        if text is not None:
            yield inside.as_posix(), text


def _file(path: Path) -> Iterator[Record]:
    if path.suffix not in FORMATS:
        raise DataError(
            f"data set {path}: unknown format {path.suffix!r}; "
            f"use one of {' '.join(FORMATS)} or a folder"
        )
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    text = _read_text(path)
    if text is None:
        raise DataError(f"data set {path}: not readable as UTF-8 text")
    if path.suffix == ".txt":
        yield path.name, text
        return
    records = _json_array(path, text) if path.suffix == ".json" else _json_lines(text)
    for number, record in records:
        yield f"{path.name}:{number}", record


def _json_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered values of a JSON array; any other value is the only one."""
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data set {path}: not JSON ({error})") from error
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered values of JSON lines; a line that is no JSON as a DataError."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            value = DataError(
                f"not JSON ({error})"
            )  # one torn line is no reason to lose the others
        yield number, value


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", record
    except pyarrow.ArrowException as error:
        raise DataError(
            f"data set {path}: not a readable Parquet file ({one_line(error)})"
        ) from error


def _hugging_face(name: str, split: str) -> Iterator[Record]:
    import datasets

    # It reports each try; the error below says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        data = datasets.load_dataset(name, split=split)
    except (
        Exception
    ) as error:  # the library raises dozens of types: network, names, splits, scripts
        hint = "neither a local path nor a Hugging Face data set that can be loaded"
        raise DataError(
            f"data set {name!r} (split {split!r}): {hint} ({one_line(error)})"
        ) from error
    for number, record in enumerate(data):
        yield f"{name}:{number}", record


def _read_text(path: Path) -> str | None:
    """Return a file's text; None where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise DataError(f"data set {path}: cannot be read ({error.strerror})") from error
