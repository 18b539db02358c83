"""What commands read and print: prompt files, result files, tables. Knows no model."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.base.whole_file import require_ordinary, whole_file
from model.decoding.slot import STAGES
from model.engine import Engine
from model.errors import DataError, OutputError

UNSTEADY = 1.3  # times as fast in one run as in another: then something is said


def read_prompts(path: Path) -> list[str]:
    """Read prompts: .txt has one per line, .jsonl an object with "prompt" (or MT-bench's "turns") per line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as prompts ({error})") from None
    prompts = list[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt_of(json.loads(line)) if path.suffix == ".jsonl" else line)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise DataError(f'{path}:{number}: is no object with "prompt" or "turns"') from None
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return prompts


def _prompt_of(row: Any) -> str:
    return str(row["prompt"] if "prompt" in row else row["turns"][0])


def check_writable(path: Path | None) -> None:
    """Raise OutputError now rather than after the work, when a result can't be written."""
    if path is None:
        return
    require_ordinary(path)
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise OutputError(f"{path}: cannot be written; name a file in a folder that exists and may be written to")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result whole, or say in one line why not."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Return a value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(engine: Engine) -> dict[str, Any]:
    """Say what was measured and on what."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "model": engine.file.name,
        "quantization": engine.file.file_type,
        "threads": engine.options.n_threads,
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


def chrome_trace(timeline: list[tuple[float, ...]]) -> dict[str, Any]:
    """Return a text's steps as chrome://tracing and Perfetto read them: an event per stage, in microseconds."""
    events = list[dict[str, Any]]()
    for number, (start, *spent) in enumerate(timeline):
        at = start - timeline[0][0]
        for stage, seconds in zip(STAGES, spent, strict=True):
            event = {"name": stage, "ph": "X", "ts": 1e6 * at, "dur": 1e6 * seconds, "pid": 0, "tid": 0}
            events.append({**event, "args": {"step": number}})
            at += seconds
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def table(results: list[dict[str, Any]]) -> str:
    """Return the figures of several comparisons as text."""
    lines = [
        "temperature  plain tok/s  medusa tok/s  speedup  acceptance length  drafted      same text  looping 8-grams"
    ]
    for r in results:
        shape = f"{r['tree_nodes'] - 1:.1f} a step"
        lines.append(
            f"{r['temperature']:11.1f}  {r['plain']['tokens_per_s']:11.1f}  {r['medusa']['tokens_per_s']:12.1f}  "
            f"{r['speedup']:6.2f}x  {r['acceptance_length']:17.2f}  {shape:11}  "
            f"{r['equal_sequences']:4d}/{r['sequences']:<4d}  {r['repeated_8grams']:15.0%}"
        )
    runs = [r["speedup_by_run"] for r in results]
    if any(max(ratios) > UNSTEADY * min(ratios) for ratios in runs):
        spans = ", ".join(f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in runs)
        lines.append(f"The runs differ (speedups of {spans}): was the machine busy with something else?")
    if any(r["equal_sequences"] < r["sequences"] for r in results):
        lines.append(
            "A text that is not the same parts at a near-tie, where the shape of a batch decides (`main.py verify`)."
        )
    return "\n".join(lines)
