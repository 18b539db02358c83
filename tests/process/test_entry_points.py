"""The entry points run from any directory, before and after an editable install."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("script", ["main.py", "model/train_medusa.py", "model/distill.py"])
def test_entry_points_run_from_any_directory(script: str, installed: bool, tmp_path: Path) -> None:
    """`-S` reads no .pth files: the editable install is unseen, dependencies are named by hand."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if not installed:
        env["PYTHONPATH"] = sysconfig.get_path("purelib")
    command = [sys.executable, *([] if installed else ["-S"]), str(ROOT / script), "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
