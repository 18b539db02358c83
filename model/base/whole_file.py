"""Files that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import os
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
