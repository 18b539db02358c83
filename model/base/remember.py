"""Small facts kept between runs in the user's cache folder, as JSON files written whole.

What is kept can always be found out again: a cache that cannot be read or written is no error.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import platformdirs

from model.base.whole_file import whole_file
from model.errors import OutputError


def folder() -> Path:
    """Return the folder that holds the files; it may not exist yet."""
    return Path(platformdirs.user_cache_dir("medusa-gguf"))


def recall(kind: str) -> dict[str, Any]:
    """Return everything remembered of one kind."""
    try:
        known = json.loads((folder() / f"{kind}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(kind: str, key: str, value: Any) -> None:
    """Add one fact to those of its kind, or replace it."""
    path = folder() / f"{kind}.json"
    with contextlib.suppress(OutputError), whole_file(path) as draft:
        draft.write_text(json.dumps({**recall(kind), key: value}, indent=1), encoding="utf-8")
