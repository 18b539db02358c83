"""The README's Python: every block runs as it stands, on the bundled model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
STAND_IN = '"model.gguf"'  # what the README calls the reader's own model


def run_blocks(text: str, model: Path) -> int:
    """Execute a text's Python blocks one after the other, as a reader would; return how many."""
    blocks = FENCE.findall(text)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks, 1):
        code = block.replace(STAND_IN, repr(str(model)))
        exec(compile(code, f"README.md, block {number}", "exec"), names)
    return len(blocks)


def test_every_block_of_the_readme_runs(
    bundled_gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One core, whatever else the machine does.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    n_blocks = run_blocks(text, bundled_gguf)
    assert n_blocks == text.count("```python") > 0
    assert capsys.readouterr().out, "they show what they have done"


@pytest.mark.parametrize(
    "block",
    [
        'raise KeyError("README")',
        'from model.engine import Engine\nEngine("model.gguf").no_such_method()',
        "x = 1\n```\n\nand\n\n```python\nx.no_such_attribute",
    ],
)
def test_a_block_that_raises_fails(block: str, bundled_gguf: Path) -> None:
    """The control."""
    with pytest.raises((KeyError, AttributeError)):
        run_blocks(f"text\n\n```python\n{block}\n```\n\nmore text\n", bundled_gguf)
