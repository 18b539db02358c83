"""The table of speed.py: its rows kept from run to run, its cells, its Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.measuring.report import write_json

TYPES = ("bf16", "q4_0+q4_0", "q4_0", "q4_k_m")  # type, + the LM head's where it differs from llama.cpp's choice
COLUMNS = (
    ("type", "type"), ("temperature", "T"), ("who", "drafted by"), ("plain_tokens_per_s", "plain tok/s"),
    ("medusa_tokens_per_s", "drafted tok/s"), ("speedup", "speedup"), ("expected_speedup", "predicted"),
    ("of_expected", "of it"), ("acceptance_length", "tokens a step"), ("nodes", "nodes a step"),
    ("draft_share", "drafting"), ("repeated_8grams", "looping 8-grams"), ("equal", "same text"),
)  # fmt: skip


def kept_rows(path: Path, about: dict[str, Any], done: set[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return the rows of other types and temperatures that were measured before in the same way."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before[key] == about[key] for key in about)
        return [r for r in before["rows"] if same and (r["type"], r["temperature"]) not in done]
    except (OSError, ValueError, KeyError):
        return []


def place(row: dict[str, Any]) -> tuple[int, float]:
    """Return where a row stands in the table."""
    return TYPES.index(row["type"]) if row["type"] in TYPES else len(TYPES), row["temperature"]


def cells(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    texts = [f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key, _ in COLUMNS]
    return "| " + " | ".join(texts) + " |"


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the rows as a Markdown table under a line of facts."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [f"{about['machine']}, {about['threads']} threads, {versions}.", ""]
    lines += [f"    {command}" for command in dict.fromkeys(row["command"] for row in rows)] + [""]
    lines += ["| " + " | ".join(title for _, title in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + [cells(row) for row in rows]) + "\n"


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON and Markdown; those of other types and temperatures stay that were measured in the same way.

    path: without suffix.
    """
    done = {(row["type"], row["temperature"]) for row in rows}
    table = sorted(kept_rows(path.with_suffix(".json"), about, done) + rows, key=place)
    write_json(path.with_suffix(".json"), {**about, "rows": table})
    path.with_suffix(".md").write_text(markdown(table, about), encoding="utf-8")
