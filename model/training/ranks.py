"""Ranks: one run in several processes, as torchrun starts them, and what they exchange.

A process that was started without torchrun is the only one, and everything here returns at once.
Knows neither heads nor files.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import DataError, UsageError, one_line

# The others may extract for days; one that dies closes its connections, which is noticed.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """Which process of a run this is.

    rank: its number of `count`; local: its number on this machine, of `local_count` there.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all have come here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Return what each process has given, by rank; anything that JSON can hold."""
        if self.count == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.rank] = len(mine)
        most = int(self.sum(sizes).max())
        everything = torch.zeros(self.count, most, dtype=torch.uint8)
        everything[self.rank, : len(mine)] = mine
        self.sum(everything)
        return [
            json.loads(bytes(row[:size].tolist()))
            for row, size in zip(everything, sizes.tolist(), strict=True)
        ]

    def first_says(self, value: Any) -> Any:
        """Return the first process's value: what follows from it must be the same for all."""
        return self.gather(value)[0]

    def any(self, flag: bool) -> bool:
        """Say whether any process says so."""
        return bool(self.sum(torch.tensor(int(flag))) > 0)

    def sum(self, values: Tensor) -> Tensor:
        """Add up all processes' tensors, in place; return them."""
        if self.count > 1:
            dist.all_reduce(values)
        return values


ALONE = Ranks()


def ranks_asked_for() -> Ranks:
    """Read what torchrun has put into the environment.

    Raises UsageError where that makes no sense.
    """
    names = {
        "rank": "RANK",
        "count": "WORLD_SIZE",
        "local": "LOCAL_RANK",
        "local_count": "LOCAL_WORLD_SIZE",
    }
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    try:
        ranks = Ranks(**{field: int(os.environ[name]) for field, name in names.items()})
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE is set, but {', '.join(names.values())} are not all numbers: use torchrun"
        ) from error
    return ranks


@contextlib.contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect all processes while the block runs. Raises DataError where another one is gone."""
    if ranks.count == 1:
        yield
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT
    )
    try:
        yield
    except RuntimeError as error:  # gloo's and nccl's
        raise DataError(
            f"another process of this run is gone, and says why ({one_line(error)}); "
            "what is finished is kept: the same command goes on"
        ) from error
    finally:
        dist.destroy_process_group()
