"""Reports: figures in, result files out. Measures nothing."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.decoding.statistics import STAGES
from model.errors import OutputError
from model.loaded_model import LoadedModel
from model.storage.whole_file import require_ordinary, whole_file


def check_writable(path: Path | None) -> None:
    """Raise OutputError where a result can't be written: now rather than after the work."""
    if path is None:
        return
    require_ordinary(path)
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise OutputError(
            f"{path}: cannot be written; name a file in a folder that exists and may be written to"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result whole. Raises OutputError."""
    with whole_file(path) as draft:
        draft.write_text(
            json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


def _finite(value: Any) -> Any:
    """Return a value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(loaded: LoadedModel) -> dict[str, Any]:
    """Return what was measured and on what machine, for a file of results."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else ""
    return {
        "model": loaded.file.name,
        "quantization": loaded.file.file_type,
        "threads": loaded.options.n_threads,
        "machine": cpu or platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("llama-cpp-python", "torch", "numpy")},
        "command": " ".join(["python", "main.py", *sys.argv[1:]]),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def stages(result: dict[str, Any]) -> str:
    """Return where the time of a drafted step goes, as text."""
    spent: dict[str, float] = result["stages_us"]
    total = sum(spent.values())
    return "\n".join(f"{stage:8} {us:10.1f} us  {us / total:6.1%}" for stage, us in spent.items())


def reliability(result: dict[str, Any]) -> str:
    """Return what each draft source promised beside what came of it, as text."""
    lines = []
    for source, counts in result["by_source"].items():
        if counts["tried"]:
            promised = counts["promised"] / counts["tried"]
            came = counts["accepted"] / counts["tried"]
            lines.append(
                f"{source:8} promised {promised:.0%}, came true {came:.0%} "
                f"(of {counts['tried']} nodes behind accepted ones)"
            )
    return "\n".join(lines)


def chrome_trace(timeline: list[tuple[float, ...]]) -> dict[str, Any]:
    """Return a sequence's steps as chrome://tracing and Perfetto read them.

    timeline: of each step when it began and how long each stage took, in seconds.
    """
    events = list[dict[str, Any]]()
    for number, (start, *spent) in enumerate(timeline):
        at = start - timeline[0][0]
        for stage, seconds in zip(STAGES, spent, strict=True):
            event = {
                "name": stage,
                "ph": "X",
                "ts": 1e6 * at,
                "dur": 1e6 * seconds,
                "pid": 0,
                "tid": 0,
            }
            events.append({**event, "args": {"step": number}})
            at += seconds
    return {"traceEvents": events, "displayTimeUnit": "ms"}
