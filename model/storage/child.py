"""Child processes that run one of our modules.

llama.cpp aborts on some files, and doesn't hear Ctrl-C. Knows no file and no llama.cpp; the
module's `__main__` does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def run_module(
    module: str, *arguments: str, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments…` to its end and return what it wrote.

    It dies with an exception in here. timeout: seconds. Raises subprocess.TimeoutExpired.
    """
    inherited = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([str(_ROOT), inherited] if inherited else [str(_ROOT)])
    # GGML_NO_BACKTRACE: a backtrace starts a debugger if it finds one.
    env = {**os.environ, "PYTHONPATH": paths, "GGML_NO_BACKTRACE": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=env, capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
    )  # fmt: skip


def ending(status: int) -> str:
    """Say in words how a child ended that did not end by itself.

    status: negative for the signal that ended it.
    """
    if -status in set(signal.Signals):
        return signal.Signals(-status).name
    return f"status {status}"
