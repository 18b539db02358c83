"""Room on the disk: asked of the disk that a path is to lie on, wherever it ends today."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model.errors import OutputError
from model.storage.disk_room import free_bytes, human_size, require_room, require_writable


def test_sizes_are_written_as_readers_like_them() -> None:
    sizes = [0, 999, 1000, 123_456, 1_000_000, 1_234_567_890]
    wanted = ["0.0 KB", "1.0 KB", "1.0 KB", "123.5 KB", "1.0 MB", "1.23 GB"]
    assert [human_size(size) for size in sizes] == wanted


def test_room_is_that_of_the_first_folder_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    usage = shutil.disk_usage(tmp_path)

    def thousand_free(path: Path) -> object:
        asked.append(path)
        return usage._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", thousand_free)
    (tmp_path / "file").touch()
    paths = [tmp_path, tmp_path / "a" / "b" / "c", tmp_path / "file", tmp_path / "file" / "x"]
    assert [free_bytes(path) for path in paths] == [1000] * 4
    assert asked == [tmp_path] * 4
    require_room(tmp_path / "x", 1000)
    with pytest.raises(
        OutputError, match=r"x: 1\.0 KB are needed, 1\.0 KB are free; choose another folder"
    ):
        require_room(tmp_path / "x", 1001)
    with pytest.raises(OutputError, match=r"are free; use less$"):
        require_room(tmp_path / "x", 1001, advice="use less")
    require_room(tmp_path / "x", -5)  # all is there already
    assert not (tmp_path / "a").exists()


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"is a file"):
        require_writable(tmp_path / "file" / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
