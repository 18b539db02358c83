"""Short names of models: what they stand for, with SmolLM2's package installed and without it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.base.known_models import (
    BUNDLED,
    SMOLLM2_FILE,
    SMOLLM2_PACKAGE,
    model_file,
    smollm2_file,
    smollm2_if_installed,
)
from model.errors import UsageError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is all of `sys.path`: what lies in it is installed, and nothing else."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    yield tmp_path
    importlib.invalidate_caches()


def install(site: Path, file: str) -> Path:
    """Put a package there that cannot be imported, as SmolLM2's can't without its dependencies."""
    package = site / SMOLLM2_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("import a_package_that_is_not_there\n")
    (package / file).write_bytes(b"GGUF")
    return package / file


def test_the_package_is_found_and_not_imported(site: Path) -> None:
    file = install(site, SMOLLM2_FILE)
    assert model_file("smollm2") == file == smollm2_if_installed()
    assert SMOLLM2_PACKAGE not in sys.modules


def test_without_the_package_the_bundled_model_is_the_default(site: Path) -> None:
    assert smollm2_file() is None and smollm2_if_installed() == BUNDLED
    with pytest.raises(UsageError, match="not installed here; `make setup`"):
        model_file("smollm2")


def test_a_package_without_the_file_is_as_none(site: Path) -> None:
    install(site, "another.gguf")
    assert smollm2_if_installed() == BUNDLED
    with pytest.raises(UsageError, match="not installed"):
        model_file("smollm2")


@pytest.mark.parametrize("name", ["smolm2", "SMOLLM2", "tiny"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match="neither a file nor one of the names smollm2, tiny-py"):
        model_file(name)


def test_paths_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_file("a/b") == Path("a/b") and model_file("b.gguf") == Path("b.gguf")
    monkeypatch.chdir(tmp_path)
    Path("weights").touch()  # a file whose name looks like a short one
    assert model_file("weights") == Path("weights")


def test_the_bundled_model_has_a_name() -> None:
    assert model_file("tiny-python") == BUNDLED and BUNDLED.is_file()
