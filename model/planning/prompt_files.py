"""Prompt files: what speed and acceptance are measured on. Knows no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.errors import DataError

PROMPTS = Path(__file__).resolve().parents[1] / "prompts"
TRIAL = PROMPTS / "trial.jsonl"  # what auto-tuning measures on
# What the commands compare on; none of it is in the training text.
HELD_OUT = PROMPTS / "python.jsonl"


def read_prompt_file(path: Path) -> list[str]:
    """Read the prompts of a file.

    .txt has one per line, .jsonl an object with "prompt" (or MT-bench's "turns") per line. Raises
    DataError where there are none, or one cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as prompts ({error})") from None
    prompts = list[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompts.append(_prompt_of(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise DataError(f'{path}:{number}: is no object with "prompt" or "turns"') from None
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return prompts


def _prompt_of(row: Any) -> str:
    if "prompt" in row:
        return str(row["prompt"])
    return str(row["turns"][0])
