"""The machine: how many cores this process may use, how much memory there is.

Knows no settings.
"""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Return how many cores this process may keep busy.

    These are its affinity's, at most the container's quota (cgroup v2). Two hyperthreads of
    one core count once: llama.cpp gains nothing from the second.
    """
    allowed = set(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_text(topology.format(n)) or str(n) for n in allowed}
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    n_cores = len(cores)
    if quota.isdigit() and period.isdigit():
        n_cores = min(n_cores, int(quota) // int(period))
    return max(1, n_cores)


def physical_memory() -> int:
    """Return the bytes of memory that this machine has; 0 where that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
