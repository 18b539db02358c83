"""Files that are there whole or not at all: written under a temporary name, synced, renamed.

The temporary name ends in the writer's process id, so what a killed writer left is told from what a living one writes.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from model.errors import OutputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; that file takes the place of `path` when all went well, and vanishes otherwise.

    Makes the folder where it is missing, and removes what killed processes left of the same file. Raises OutputError
    when something cannot be written, or must not be replaced.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    require_ordinary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
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


def _remove_left_behind(path: Path) -> None:
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid = draft.name.rpartition(".")[2]
        if pid.isdecimal() and not _lives(int(pid)):
            draft.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; or no process id at all
        return True
    return True


def require_ordinary(path: Path) -> None:
    """Raise OutputError where something stands that a file must not replace, such as /dev/null or a folder."""
    if path.is_dir():
        raise OutputError(f"{path}: this is a folder; name a file in it")
    if os.path.lexists(path) and not path.is_file():
        raise OutputError(f"{path}: this is no ordinary file; name another one")


def human_size(n_bytes: float) -> str:
    """Return a number of bytes as a reader likes it."""
    unit, by = next((u, b) for u, b in (("GB", 1e9), ("MB", 1e6), ("KB", 1.0e3)) if n_bytes >= b or u == "KB")
    return f"{n_bytes / by:.{2 if unit == 'GB' else 1}f} {unit}"


def require_room(path: Path, n_bytes: int) -> None:
    """Raise OutputError where the disk that `path` is to lie on has fewer bytes free; its folder may not exist yet."""
    folder = next((f for f in path.absolute().parents if f.is_dir()), None)
    if folder is not None and (free := shutil.disk_usage(folder).free) < n_bytes:
        need = f"{human_size(n_bytes)} are needed, {human_size(free)} are free"
        raise OutputError(f"{path}: {need}; choose another folder or make room")
