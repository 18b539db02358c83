"""Files that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from model.errors import OutputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; that file takes the place of `path` when all went well, and vanishes otherwise.

    Makes the folder where it is missing. Raises OutputError when something cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with draft.open("r+b") as f:
            os.fsync(f.fileno())
        draft.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); choose another folder or make room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def require_room(path: Path, n_bytes: int) -> None:
    """Raise OutputError where the disk that `path` is to lie on has fewer bytes free; its folder may not exist yet."""
    folder = next((f for f in path.absolute().parents if f.is_dir()), None)
    if folder is not None and (free := shutil.disk_usage(folder).free) < n_bytes:
        need = f"{n_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise OutputError(f"{path}: {need}; choose another folder or make room")
