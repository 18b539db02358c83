"""Whole files: there with all they hold, or as they were before."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.base.whole_file import whole_file
from model.errors import OutputError


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    with whole_file(path) as draft:
        draft.write_text("one")
        assert not path.exists()

    def fail(error: BaseException) -> None:
        with whole_file(path) as draft:
            draft.write_text("tw")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(OutputError, match=r"x\.json: cannot be written \(No space left"):
        fail(OSError(28, "No space left on device"))
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), whole_file(tmp_path / "file" / "x") as draft:
        draft.touch()
