"""How many cores a process may keep busy."""

from __future__ import annotations

import os

import pytest

from model.base import cores
from model.base.cores import usable_cores


def test_usable_cores_follow_affinity_siblings_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, str] = {}
    monkeypatch.setattr(cores, "_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert usable_cores() == 4
    for n, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        files[f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list"] = siblings
    assert usable_cores() == 2
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert usable_cores() == 2
    files["/sys/fs/cgroup/cpu.max"] = "150000 100000"
    assert usable_cores() == 1
    files["/sys/fs/cgroup/cpu.max"] = "20000 100000"
    assert usable_cores() == 1
