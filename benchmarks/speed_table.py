"""The table of speed.py: rows kept from run to run, cells, Markdown. Measures nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.evaluation.report import write_json

# Type, + the LM head's where it differs from llama.cpp's choice.
TYPES = ("bf16", "q4_0+q4_0", "q4_0", "q4_k_m")
COLUMNS = (
    ("type", "type"),
    ("temperature", "T"),
    ("drafted_by", "drafted by"),
    ("plain_tokens_per_s", "plain tok/s"),
    ("drafted_tokens_per_s", "drafted tok/s"),
    ("speedup", "speedup"),
    ("expected_speedup", "predicted"),
    ("of_expected", "of it"),
    ("acceptance_length", "tokens a step"),
    ("nodes", "nodes a step"),
    ("draft_share", "drafting"),
    ("repeated_8grams", "looping 8-grams"),
    ("equal", "same output"),
)
OLD_KEYS = {"drafted_by": "who", "prompts": "texts", "drafted_tokens_per_s": "medusa_tokens_per_s"}


def with_all_keys(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row under the keys of today and of before: files and scripts may have either."""
    row = dict(row)
    for key, old in OLD_KEYS.items():
        if key in row:
            row[old] = row[key]
        elif old in row:
            row[key] = row[old]
    return row


def kept_rows(
    path: Path, about: dict[str, Any], done: set[tuple[str, float]]
) -> list[dict[str, Any]]:
    """Return the rows of other types and temperatures that were measured before in the same way.

    done: types and temperatures that were measured anew.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if any(before[key] != value for key, value in about.items()):
            return []
        rows = [with_all_keys(row) for row in before["rows"]]
        return [row for row in rows if (row["type"], row["temperature"]) not in done]
    except (OSError, ValueError, KeyError):
        return []


def sort_key(row: dict[str, Any]) -> tuple[int, float]:
    """Return what rows are sorted by: the types in the order of TYPES, then the temperature."""
    number = TYPES.index(row["type"]) if row["type"] in TYPES else len(TYPES)
    return number, row["temperature"]


def cells(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    texts = list[str]()
    for key, _ in COLUMNS:
        value = row[key]
        texts.append(f"{value:.2f}" if isinstance(value, float) else str(value))
    return "| " + " | ".join(texts) + " |"


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the rows as a Markdown table under a line of facts."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    commands = dict.fromkeys(row["command"] for row in rows)  # each once, in order
    lines = [
        f"{about['machine']}, {about['threads']} threads, {versions}.",
        "",
        *(f"    {command}" for command in commands),
        "",
        "| " + " | ".join(title for _, title in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *(cells(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON and Markdown.

    Those of other types and temperatures stay that were measured in the same way. path: without
    suffix.
    """
    done = {(row["type"], row["temperature"]) for row in rows}
    known = kept_rows(path.with_suffix(".json"), about, done)
    table = sorted([*known, *map(with_all_keys, rows)], key=sort_key)
    write_json(path.with_suffix(".json"), {**about, "rows": table})
    path.with_suffix(".md").write_text(markdown(table, about), encoding="utf-8")
