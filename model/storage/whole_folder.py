"""Folders that are there whole or not at all: written beside the old one, synced, swapped in.

A folder is replaced by two renames; should the process die between them, the former version lies
beside it as `.NAME.old`, where readers and the next writer find it. Knows nothing of what is in
one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import OutputError, one_line


@contextmanager
def whole_folder(folder: Path, *, marker: str, holds: str) -> Iterator[Path]:
    """Give a folder to write into; it replaces `folder` when all went well, and vanishes otherwise.

    marker: the file by which a folder of the same kind is known; others that hold something are not
    replaced. holds: what such a folder holds, for the message. Raises OutputError when it can't be
    written (a full disk, no permission) or must not be replaced.
    """
    folder = folder.resolve()
    new = folder.with_name(f".{folder.name}.new")
    old = former_folder(folder)
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).exists():
            raise OutputError(f"{folder} holds other files than {holds}: give another folder")
        # A swap that was cut short is undone first: the former version is the only one there is.
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)

        yield new

        # All bytes are on the disk before the first rename.
        for path in new.iterdir():
            _sync(path)
        _sync(new)
        # The swap.
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {one_line(error)}; give another folder or free space"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def former_folder(folder: Path) -> Path:
    """Return where a folder's former version lies while the folder is being replaced."""
    return folder.with_name(f".{folder.name}.old")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
