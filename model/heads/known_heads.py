"""Known heads: those in a folder that belong to a model. Reads their facts, not their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.base.gguf_file import GGUFFile

HEADS_FOLDER = Path(__file__).resolve().parents[2] / "medusa_heads_weights"


def find_heads(folder: Path, file: GGUFFile) -> Path | None:
    """Return the heads below `folder` that belong to a model.

    Of several: those made for this very file, in the folder named after it, the best of a run, the
    latest run.
    """
    wanted = file.heads_fingerprint()
    candidates = list[tuple[bool, bool, bool, float, Path]]()
    for path in folder.glob("**/config.json"):
        heads = path.parent
        inside = heads.relative_to(folder).parts
        facts = _read_facts(path)
        if facts.get("heads_fingerprint") != wanted or any(part.startswith(".") for part in inside):
            continue
        same_file = facts.get("base_fingerprint") == file.file_fingerprint()
        same_name = inside[:1] in ((file.path.stem,), (file.path.name.split(".")[0],))
        unfinished = heads.name.startswith(("medusa_heads_latest", "medusa_heads_epoch"))
        candidates.append((same_file, same_name, not unfinished, path.stat().st_mtime, heads))
    return max(candidates)[-1] if candidates else None


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
