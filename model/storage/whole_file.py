"""Files that are there whole or not at all: written under a temporary name, synced, renamed.

The temporary name ends in the writer's process id, so what a killed writer left is told from what a
living one writes. Knows nothing of what is in a file.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from model.errors import OutputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; that file replaces `path` if all goes well, and vanishes otherwise.

    Makes the folder where it is missing, and removes what killed processes left of the same file.
    Raises OutputError when something cannot be written, or must not be replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    require_ordinary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
        yield temporary
        with temporary.open("r+b") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); choose another folder or make room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _remove_left_behind(path: Path) -> None:
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid = temporary.name.rpartition(".")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            temporary.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; or no process id at all
        return True
    return True


def require_ordinary(path: Path) -> None:
    """Raise OutputError for what a file must not replace, such as /dev/null or a folder."""
    if path.is_dir():
        raise OutputError(f"{path}: this is a folder; name a file in it")
    if os.path.lexists(path) and not path.is_file():
        raise OutputError(f"{path}: this is no ordinary file; name another one")
