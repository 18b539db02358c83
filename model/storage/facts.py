"""Small facts kept between runs in the user's cache folder, as JSON files written whole.

What is kept can always be found out again: a fact that cannot be read or written is no error. Knows
nothing of what the facts say.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from model.errors import OutputError
from model.storage.whole_file import whole_file

# A writer holds the lock for milliseconds; a fact is not worth a longer wait.
_LOCK_TIMEOUT_S = 10.0
_CPUINFO = Path("/proc/cpuinfo")
_TELLING = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # x86, ARM


def folder() -> Path:
    """Return the folder that holds the files; it may not exist yet."""
    return Path(platformdirs.user_cache_dir("medusa-gguf"))


@functools.cache
def this_machine() -> str:
    """Return what a fact that holds on this machine alone has in its key.

    Virtual machines of one name run on different processors, which Linux alone tells apart.
    """
    processor = platform.processor()
    with contextlib.suppress(OSError):
        told = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        known = sorted({line for line in told if line.startswith(_TELLING)})
        processor += f" {zlib.crc32(''.join(known).encode()):08x}"
    return f"{platform.node()} {processor} {os.cpu_count()}"


def key_here(*settings: Any) -> str:
    """Return the key of a fact that holds for these settings, this llama.cpp and this machine."""
    return " ".join(map(str, (*settings, version("llama-cpp-python"), this_machine())))


def recall(kind: str) -> dict[str, Any]:
    """Return everything remembered of one kind; nothing where the file is missing or damaged."""
    try:
        known = json.loads((folder() / f"{kind}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(kind: str, key: str, value: Any) -> None:
    """Add one fact to those of its kind, or replace it; processes and threads take turns.

    Without turns, of two that read the file at the same time the first one's fact would be lost.
    """
    path = folder() / f"{kind}.json"
    with contextlib.suppress(OutputError, OSError):  # OSError: the lock's, its timeout too
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S, poll_interval=0.01),
            whole_file(path) as new,
        ):
            new.write_text(json.dumps({**recall(kind), key: value}, indent=1), encoding="utf-8")
