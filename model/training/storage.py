"""Folders that runs write to: can they be, and by one process at a time. Knows nothing of what is in them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from model.errors import DataError, OutputError


def require_writable(folder: Path) -> None:
    """Raise OutputError where a folder cannot be made or written; makes nothing."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{folder}: cannot be made, {parent} is a file; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: {parent} is not writable; choose another folder")


class WriterLock:
    """The right to write into a folder, held by one process at a time; a dead process gives it up by dying."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"

    def __enter__(self) -> WriterLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+", encoding="ascii")
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written ({error.strerror}); choose another folder") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise DataError(f"{self._path.parent}: process {holder} is writing there; wait or stop it") from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.truncate(0)
        self._file.close()
