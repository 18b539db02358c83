"""Small facts kept between runs in the user's cache folder, as JSON files written whole.

What is kept can always be found out again: a cache that cannot be read or written is no error.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import platformdirs


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
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps({**recall(kind), key: value}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        draft.replace(path)
