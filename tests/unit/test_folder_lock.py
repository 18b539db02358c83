"""The right to write into a folder: one process has it, and a dead one gives it up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import DataError, OutputError
from model.storage.folder_lock import WriterLock

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from pathlib import Path
from model.storage.folder_lock import WriterLock
with WriterLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_each_time_until_the_holder_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    for _ in range(2):  # a vain attempt must not wipe out who holds it
        with (
            pytest.raises(DataError, match=f"process {holder.pid} is writing there"),
            WriterLock(folder),
        ):
            pass
    holder.kill()
    holder.communicate()
    with WriterLock(folder):
        assert (folder / "lock.pid").read_text() == str(os.getpid())
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_an_error_in_the_block_gives_the_lock_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), WriterLock(tmp_path):
        raise KeyboardInterrupt
    with (
        WriterLock(tmp_path),
        pytest.raises(DataError, match="is writing there"),
        WriterLock(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), WriterLock(tmp_path / "file" / "x"):
        pass
