"""Whole files: there with all they hold, or as they were before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import OutputError
from model.storage.whole_file import require_ordinary, whole_file


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    with whole_file(path) as new:
        new.write_text("one")
        assert not path.exists()

    def fail(error: BaseException) -> None:
        with whole_file(path) as new:
            new.write_text("tw")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(OutputError, match=r"x\.json: cannot be written \(No space left"):
        fail(OSError(28, "No space left on device"))
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """Such as /dev/null, which root could rename a file onto."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, what in ((pipe, "no ordinary file"), (tmp_path, "a folder")):
        with pytest.raises(OutputError, match=what), whole_file(path) as new:
            new.touch()
        with pytest.raises(OutputError, match=what):
            require_ordinary(path)
    assert pipe.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="cannot be written"),
        whole_file(tmp_path / "file" / "x") as new,
    ):
        new.touch()


def test_a_killed_writers_file_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "file[1].json"
    left = tmp_path / f".{path.name}.{dead.pid}"
    others = [f".{path.name}.{os.getppid()}", f".{path.name}.notes"]
    for name in (left.name, *others):
        (tmp_path / name).write_text("half")
    with whole_file(path) as new:
        new.write_text("whole")
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([path.name, *others])
