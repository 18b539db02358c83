"""The demo's own text: the Python files of the standard library that runs this. Makes no tokens."""

from __future__ import annotations

import contextlib
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = ("site-packages/", "dist-packages/", "encodings/", "lib2to3/tests/data/")
MIN_BYTES = 200
MAX_BYTES = 200_000  # larger ones are tables, not code
HELD_OUT = 50  # one file in so many


def held_out(name: str) -> bool:
    """Say whether a file is held out from all training: one in fifty, by a hash of its path."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0


def standard_library(root: Path | None = None, *, held: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the files' names and texts, mixed by a hash of their paths.

    held: the files that are held out from all training, instead of the others.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in sorted(names, key=_order):
        if name.startswith(SKIPPED) or held_out(name) != held:
            continue
        path = root / name
        if not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
            continue
        with contextlib.suppress(UnicodeDecodeError):  # some tests of Python's own are no UTF-8
            yield name, path.read_text(encoding="utf-8")


def _order(name: str) -> bytes:
    return hashlib.sha256(f"order {name}".encode()).digest()
