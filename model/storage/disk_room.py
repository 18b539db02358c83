"""Room on the disk, and whether a folder can be written: asked before hours of work, not after.

Knows nothing of what is to be written, and makes nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from model.errors import OutputError

OTHER_PLACE = "choose another folder or make room"
_UNITS = ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "KB", 1))  # bytes, name, decimals


def human_size(n_bytes: float) -> str:
    """Return a number of bytes as a reader likes it."""
    size, unit, decimals = next((u for u in _UNITS if n_bytes >= u[0]), _UNITS[-1])
    return f"{n_bytes / size:.{decimals}f} {unit}"


def free_bytes(path: Path) -> int:
    """Return the bytes free on the disk that `path` is to lie on; it may not exist yet."""
    whole = path.absolute()
    folder = next(place for place in (whole, *whole.parents) if place.is_dir())
    return shutil.disk_usage(folder).free


def require_room(path: Path, n_bytes: int, *, advice: str = OTHER_PLACE) -> None:
    """Raise OutputError where fewer bytes are free than are still to be written to `path`.

    n_bytes: what comes in addition; files that are there already are the caller's to subtract.
    advice: what the user can do about it.
    """
    free = free_bytes(path)
    if free < n_bytes:
        raise OutputError(
            f"{path}: {human_size(n_bytes)} are needed, {human_size(free)} are free; {advice}"
        )


def require_writable(folder: Path) -> None:
    """Raise OutputError where a folder cannot be made or written."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{folder}: cannot be made, {parent} is a file; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: {parent} is not writable; choose another folder")
