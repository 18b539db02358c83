"""The right to write into a folder, held by one process at a time.

Knows nothing of what is in it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from model.errors import DataError, OutputError


class WriterLock:
    """The lock of a folder, while a `with` block runs; a dead process gives it up by dying.

    The lock itself is on the file `lock`; `lock.pid` says whose it is. It is a file of its own
    because some versions of filelock empty the locked file when they only try it.
    Raises DataError where another process holds it, OutputError where the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._holder = folder / "lock.pid"
        # Taken in one thread, it may be given up in another.
        self._lock = FileLock(folder / "lock", thread_local=False)

    def __enter__(self) -> WriterLock:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            self._holder.write_text(str(os.getpid()), encoding="ascii")
        except Timeout as error:
            raise DataError(
                f"{self._folder}: process {self._read_holder()} is writing there; wait or stop it"
            ) from error
        except OSError as error:
            self._lock.release()
            raise OutputError(
                f"{self._folder / 'lock'}: cannot be written ({error.strerror}); "
                "choose another folder"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._holder.unlink()
        self._lock.release()

    def _read_holder(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return self._holder.read_text(encoding="ascii").strip() or "unknown"
        return "unknown"
