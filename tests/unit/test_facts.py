"""Remembered facts: nothing is lost when two processes write at once, and damage is no error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from model.storage import facts

ROOT = Path(__file__).resolve().parents[2]
N_FACTS = 25  # that each process remembers

# Two of these begin together. Reading is slowed down in both, so that without a lock they are all
# but certain to read the same file: each of 25 rounds would have to fall into a gap of the other's.
WRITER = """
import contextlib, sys, time
from pathlib import Path
from model.storage import facts

folder, name, locked, n = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
facts.folder = lambda: folder
if not locked:
    facts.FileLock = lambda *_, **__: contextlib.nullcontext()
recall = facts.recall

def slowly(kind):
    known = recall(kind)
    time.sleep(0.005)
    return known

facts.recall = slowly
Path(folder, f"ready-{name}").touch()
while not Path(folder, "go").exists():
    time.sleep(0.001)
for i in range(n):
    facts.remember("numbers", f"{name}{i}", i)
"""


def write_at_once(folder: Path, *, locked: bool) -> set[str]:
    """Let two processes remember N_FACTS facts each; return the keys that are there."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), name, str(locked), str(N_FACTS)], cwd=ROOT
        )
        for name in "ab"
    ]
    while len(list(folder.glob("ready-*"))) < 2:
        assert all(writer.poll() is None for writer in writers)
    (folder / "go").touch()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    return set(json.loads((folder / "numbers.json").read_text()))


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    wanted = {f"{name}{i}" for name in "ab" for i in range(N_FACTS)}
    assert write_at_once(tmp_path, locked=True) == wanted


def test_without_the_lock_facts_are_lost(tmp_path: Path) -> None:
    """The control: what the test above would not notice otherwise."""
    assert len(write_at_once(tmp_path, locked=False)) < 2 * N_FACTS


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"[" * 100_000])
def test_damaged_files_are_no_error_and_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    monkeypatch.setattr(facts, "folder", lambda: tmp_path)
    (tmp_path / "numbers.json").write_bytes(damage)
    assert facts.recall("numbers") == {}
    facts.remember("numbers", "one", 1)
    facts.remember("numbers", "two", [2])
    assert facts.recall("numbers") == {"one": 1, "two": [2]}
    assert facts.recall("others") == {}


def test_a_folder_that_cannot_be_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(facts, "folder", lambda: tmp_path / "file" / "x")
    facts.remember("numbers", "one", 1)
    assert facts.recall("numbers") == {}


def test_a_lock_that_is_never_given_up_costs_the_fact_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "folder", lambda: tmp_path)
    monkeypatch.setattr(facts, "_LOCK_TIMEOUT_S", 0.05)
    with FileLock(tmp_path / "numbers.lock"):
        facts.remember("numbers", "one", 1)
    assert facts.recall("numbers") == {}
    facts.remember("numbers", "one", 1)
    assert facts.recall("numbers") == {"one": 1}


def test_two_processors_are_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(facts, "_CPUINFO", cpuinfo)

    def machine(flags: str, mhz: int) -> str:
        core = f"model name\t: Some CPU\ncpu MHz\t: {mhz}\nflags\t: {flags}\n"
        cpuinfo.write_text(2 * core)
        facts.this_machine.cache_clear()
        return facts.this_machine()

    assert machine("avx2", 2000) == machine("avx2", 2600) != machine("avx2 avx512f", 2000)
    cpuinfo.unlink()
    facts.this_machine.cache_clear()
    assert facts.this_machine()
    facts.this_machine.cache_clear()
